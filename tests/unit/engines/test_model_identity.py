from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from pear_data.engines.model_identity import model_identity
from pear_data.errors import PearError


def sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def model(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": b"{}", **files}.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_directory_is_named_without_its_path_wherever_it_lies(tmp_path: Path) -> None:
    first = model(tmp_path / "here" / "tiny", **{"model.safetensors": b"weights"})
    second = tmp_path / "there" / "tiny"
    shutil.copytree(first, second)
    identity = model_identity(str(first), None)
    assert (
        identity
        == model_identity(f"{second}/", None)
        == {
            "model": "tiny",
            "revision": None,
            "weights_sha256": sha256(f"model.safetensors {sha256(b'weights')}\n".encode()),
            "config_sha256": sha256(b"{}"),
        }
    )
    assert str(tmp_path) not in json.dumps(identity)


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json"])
def test_changed_content_changes_it(tmp_path: Path, changed: str) -> None:
    folder = model(tmp_path, **{"model.safetensors": b"weights"})
    before = model_identity(str(folder), None)
    (folder / changed).write_bytes(b"other")
    assert model_identity(str(folder), None) != before


def test_only_the_files_of_the_index_count(tmp_path: Path) -> None:
    index = json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    )
    files = {
        "model-1.safetensors": b"1",
        "model-2.safetensors": b"2",
        "model.safetensors.index.json": index.encode(),
    }
    folder = model(tmp_path, **files)
    before = model_identity(str(folder), None)
    model(tmp_path, **{"consolidated.safetensors": b"the same again"})
    assert model_identity(str(folder), None) == before
    listing = f"model-1.safetensors {sha256(b'1')}\nmodel-2.safetensors {sha256(b'2')}\n"
    assert before["weights_sha256"] == sha256(listing.encode())


def test_a_hub_model_takes_revision_and_hashes_from_the_cache(offline: Path) -> None:
    commit, digest = "c" * 40, sha256(b"not read")
    repository = offline / "models--team--tiny"
    model(repository / "blobs", **{digest: b"large"})
    snapshot = model(repository / "snapshots" / commit)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / digest)
    model(repository / "refs", main=commit.encode())
    for revision in (None, "main", commit):
        assert model_identity("team/tiny", revision) == {
            "model": "team/tiny",
            "revision": commit,
            "weights_sha256": sha256(f"model.safetensors {digest}\n".encode()),
            "config_sha256": sha256(b"{}"),
        }


def test_what_is_not_there(tmp_path: Path, offline: Path) -> None:
    with pytest.raises(PearError, match="team/absent: not in the Hugging Face cache"):
        model_identity("team/absent", None)
    with pytest.raises(PearError, match="empty: no safetensors weights"):
        model_identity(str(model(tmp_path / "empty")), None)
