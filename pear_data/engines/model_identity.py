"""Which model gave the numbers: its name, revision and the hashes of its weights and configuration."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pear_data.errors import PearError

_INDEX = "model.safetensors.index.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def model_identity(name_or_path: str, revision: str | None) -> dict[str, str | None]:
    """`model`, `revision`, `weights_sha256` and `config_sha256` of a local directory or of a hub model in the cache.

    A local directory is named by its last component and has no revision, so that the same files give the same
    identity wherever they lie; a hub model's revision is the commit its snapshot came from. `weights_sha256` is
    the SHA-256 of the lines "<file name> <SHA-256 of the file>", sorted. Hashing reads every local weight file
    once; files of the hub cache carry their hash in their name.

    Raises PearError where the files are not there (a hub model must have been loaded before).
    """
    local = Path(name_or_path)
    folder = local if local.is_dir() else _cached_snapshot(name_or_path, revision)
    files = _weight_files(folder)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_sha256, files))
    listing = "".join(f"{file.name} {digest}\n" for file, digest in sorted(zip(files, hashes, strict=True)))
    return {
        "model": local.resolve().name if local.is_dir() else name_or_path,
        "revision": None if local.is_dir() else folder.name,
        "weights_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "config_sha256": _sha256(folder / "config.json"),
    }


def _cached_snapshot(repository: str, revision: str | None) -> Path:
    """The folder of the hub cache whose name is the commit that `revision` stands for."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(config, str):
        raise PearError(f"{repository}: not in the Hugging Face cache; load the model first")
    return Path(config).parent


def _weight_files(folder: Path) -> list[Path]:
    """The files a loader reads: those of the index, else the one file, else whatever safetensors there are."""
    if (folder / _INDEX).is_file():
        shards = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / shard for shard in set(shards)]
    files = sorted(folder.glob("model.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise PearError(
            f"{folder.name}: no safetensors weights; convert the checkpoint with save_pretrained first"
        )
    return files


def _sha256(file: Path) -> str:
    stored = file.resolve()
    if stored.parent.name == "blobs" and _SHA256.fullmatch(stored.name):
        return stored.name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
