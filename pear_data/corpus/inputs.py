"""The files a corpus consists of: named, told apart by their first bytes, hashed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pear_data.errors import PearError, UsageError
from pear_data.redaction import redacted
from pear_data.store.commit import TEMP_SUFFIX

STDIN = "-"
_CHUNK = 1 << 20
_READABLE = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
_PACKED = (".gz", ".zst")

Kind = Literal["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"]
_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),  # the stream form, which `datasets` writes
    (b"\x1f\x8b", "jsonl.gz"),
    (b"\x28\xb5\x2f\xfd", "jsonl.zst"),
)


@dataclass(frozen=True, slots=True)
class Input:
    """One file of a corpus. `name` stands for it in messages and default sample ids; `source` is its samples'."""

    path: Path
    name: str
    source: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    source: str
    given: Path  # what to name it by
    parts: int = 1  # of `given` that make the name


@contextlib.contextmanager
def opened_inputs(corpus: Sequence[str], spool_folder: Path) -> Iterator[list[Input]]:
    """The files that `corpus` names: files, folders of files, saved datasets, "-" for standard input.

    What cannot be read twice (standard input, pipes) is first copied to a private file in `spool_folder`, which
    is gone at the end.

    Raises:
        UsageError: something does not exist, holds no data or several splits, or is given twice.
        PearError: it cannot be read or copied.
    """
    with contextlib.ExitStack() as stack:
        found: list[_Found] = []
        for given in corpus:
            path = Path("/dev/stdin" if given == STDIN else given).absolute()
            if path.is_dir():
                found += _in_folder(path)
            elif path.is_file() and given != STDIN:
                found.append(_Found(path, stem_of(path.name), path))
            elif path.exists() or given == STDIN:
                spool = spool_folder / f"{path.name}-{len(found)}{TEMP_SUFFIX}"
                stack.callback(spool.unlink, missing_ok=True)
                _copy(path, spool)
                found.append(_Found(spool, path.name, path))
            else:
                raise UsageError(f"no such file: {given}")
        yield [
            Input(each.path, name, redacted(each.source), _kind(each.path))
            for each, name in zip(found, _names(found), strict=True)
        ]


def sha256_of(path: Path, on_bytes: Callable[[int], None]) -> str:
    """sha256 of an input, reporting the bytes read as it goes.

    Raises:
        PearError: it cannot be read.
    """
    digest = hashlib.sha256()
    with _reading(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def _in_folder(folder: Path) -> list[_Found]:
    if (folder / "dataset_dict.json").is_file():
        splits = _listed(
            folder / "dataset_dict.json", lambda content: [Path(split).name for split in content["splits"]]
        )
        if len(splits) != 1:
            raise UsageError(
                f"{folder} holds the splits {', '.join(splits)}: give one of them, such as {folder / splits[0]}"
            )
        return _in_folder(folder / splits[0])
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        whole = folder.parent if (folder.parent / "dataset_dict.json").is_file() else folder
        names = _listed(
            folder / "state.json",
            lambda content: [Path(entry["filename"]).name for entry in content["_data_files"]],
        )
        return [_Found(folder / name, whole.name, folder / name, 2) for name in names]
    paths = sorted(path for path in folder.iterdir() if _is_readable(path))
    if not paths:
        inner = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f"; it has the folders {', '.join(inner)}" if inner else ""
        raise UsageError(f"{folder} holds no {', '.join(_READABLE)} (or .gz, .zst) files{hint}")
    return [_Found(path, stem_of(path.name), path, 2) for path in paths]


def _is_readable(path: Path) -> bool:
    name = path.name
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return path.is_file() and name.endswith(_READABLE) and not name.startswith(".")


def stem_of(name: str) -> str:
    """A file's name without what says how it is written."""
    for suffix in (*_PACKED, *_READABLE):
        name = name.removesuffix(suffix)
    return name


def _listed(path: Path, names: Callable[[Any], list[str]]) -> list[str]:
    """File names that a saved dataset's JSON lists."""
    try:
        with _reading(path):
            found = names(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        found = []
    if not found:
        raise PearError(f"{path} lists no data: the saved dataset is damaged or empty, save it again")
    return found


def _names(found: list[_Found]) -> list[str]:
    """As many trailing parts of each path as tell it from the others."""
    repeated = [path for path, count in Counter(each.given.resolve() for each in found).items() if count > 1]
    if repeated:
        raise UsageError(f"{repeated[0]} is given twice: its rows would be, too")
    parts = [each.parts for each in found]
    while True:
        names = ["/".join(each.given.parts[-count:]) for each, count in zip(found, parts, strict=True)]
        counts = Counter(names)
        if len(counts) == len(names):
            return _without_secrets(names)
        parts = [count + (counts[name] > 1) for count, name in zip(parts, names, strict=True)]


def _without_secrets(names: list[str]) -> list[str]:
    """Names for the manifest and sample ids: a file that was downloaded may carry the query of its address."""
    hidden = [redacted(name) for name in names]
    for name, count in Counter(hidden).items():
        if count > 1:
            raise UsageError(f"{name}: {count} files differ only in a secret in their names: rename them")
    return hidden


def _kind(path: Path) -> Kind:
    with _reading(path), path.open("rb") as file:
        head = file.read(8)
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), "jsonl")


def _copy(path: Path, spool: Path) -> None:
    try:
        with (
            contextlib.nullcontext(sys.stdin.buffer) if path.name == "stdin" else path.open("rb") as source,
            os.fdopen(os.open(spool, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
        ):
            shutil.copyfileobj(source, file, _CHUNK)
    except OSError as error:
        raise PearError(
            f"cannot copy {path} to {spool}: {error.strerror}; save it to a file and give that"
        ) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PearError(f"cannot read {path}: {error.strerror or error}") from error
