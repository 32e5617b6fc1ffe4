"""Files that exist whole or not at all: write temp, close, fsync, checksum, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pear_data.errors import PearError
from pear_data.store.private import create_private, open_to_others

TEMP_SUFFIX = ".tmp"

# Fault injection: called with the final path before every write reaches the disk; tests make the n-th call raise.
on_write: Callable[[Path], None] | None = None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `final` when the block ends well and vanishes when it does not.

    Nobody else can read it before it is `final`. The block writes into the empty file that is there.

    Raises:
        PearError: the disk refused (full, read-only, too large a file), naming the path.
    """
    temporary = final.with_name(final.name + TEMP_SUFFIX)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(final, error) from error
    try:
        temporary.unlink(missing_ok=True)  # a link planted there must not be written through
        create_private(temporary)
        yield temporary
        if on_write is not None:
            on_write(final)
        open_to_others(temporary)
        _fsync(temporary)
        temporary.replace(final)
        _fsync(final.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(final), str(final.parent)):
            raise
        raise _refused(final, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(final: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(final) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sweep_leftovers(folder: Path) -> None:
    """Remove what a killed writer left; only the holder of the store's lock may."""
    for leftover in list(folder.rglob(f"*{TEMP_SUFFIX}")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def _refused(final: Path, error: OSError) -> PearError:
    reason = error.strerror or str(error).splitlines()[0]
    return PearError(
        f"cannot write {final}: {reason}; free space or choose another place, then run the same command again"
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
