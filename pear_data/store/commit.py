"""Files that exist whole or not at all: write temp, close, fsync, rename, fsync the folder; their entry comes last."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pear_data.errors import PearError
from pear_data.store.private import create_private, open_to_others

TEMP_SUFFIX = ".tmp"
AGAIN = ".again"
# Where `migrate` keeps what it replaces until the new manifest is written.
ASIDE = "before-migration"

# Fault injection: called before everything that changes a disk with what it is and the path it is for; tests make the
# n-th operation fail, or end the process there.
on_operation: Callable[[str, Path], None] | None = None


@contextlib.contextmanager
def operation(what: str, final: Path) -> Iterator[None]:
    """One operation on the disk, for the file or folder that will be at `final`.

    Raises:
        PearError: the disk refused (full, read-only, too large a file), naming the path.
    """
    try:
        if on_operation is not None:
            on_operation(what, final)
        yield
    except OSError as error:
        raise _refused(final, error) from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `final` when the block ends well and vanishes when it does not.

    Nobody else can read it before it is `final`. The block writes into the empty file that is there; what it writes
    belongs into an `operation`. No two temporary paths are the same: a worker that outlived its parent by a moment must
    not write into the file of the next.

    Raises:
        PearError: the disk refused, naming the path.
    """
    temporary = final.with_name(f"{final.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")
    with operation("make folder", final):
        make_folder(final.parent)
    try:
        with operation("create", final):
            create_private(temporary)
        yield temporary
        with operation("sync", final):
            open_to_others(temporary)
            _fsync(temporary)
        put_in_place(temporary, final)
    finally:
        with contextlib.suppress(OSError):  # swept by the next writer
            temporary.unlink(missing_ok=True)


def put_in_place(written: Path, final: Path) -> None:
    """Rename a file that is written and synced, to last.

    Raises:
        PearError: the disk refused.
    """
    with operation("rename", final):
        written.replace(final)
    sync_folder(final)


def write_atomically(final: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(final) as temporary, operation("write", final):
        temporary.write_text(text, encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, to last: a file in a folder that a crash forgets is lost."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        _fsync(each.parent)


def sync_folder(final: Path) -> None:
    """Make the name of a file or folder that was put in place last.

    Raises:
        PearError: the disk refused.
    """
    with operation("sync folder", final):
        _fsync(final.parent)


def sweep_leftovers(folder: Path) -> None:
    """Remove what a killed writer left; only the holder of the store's lock may."""
    for leftover in list(folder.rglob(f"*{TEMP_SUFFIX}")):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def path_beside(path: Path, taken: Collection[Path]) -> Path:
    """`path`, or another for what is to replace the file there: that stays until its successor is committed."""
    return path.with_suffix(f"{AGAIN}{path.suffix}") if path in taken else path


def sweep_replaced(folder: Path, kept: Collection[Path]) -> None:
    """Remove what is not of the `kept` of each two files of which one was to replace the other, and in quarantine."""
    ending = f"{AGAIN}.parquet"
    found = list((folder / "quarantine").glob("*.parquet"))
    for again in folder.rglob(f"*{ending}"):
        found += [again, again.with_name(f"{again.name.removesuffix(ending)}.parquet")]
    for path in set(found).difference(kept):
        with operation("remove", path):
            path.unlink(missing_ok=True)


def _refused(final: Path, error: OSError) -> PearError:
    reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    other = {errno.EEXIST: "remove it", errno.EMFILE: "raise the limit with `ulimit -n`"}
    remedy = "free space" if full else other.get(error.errno or 0, "mend that")
    space = _space(final) if full else ""
    return PearError(
        f"cannot write {final}: {reason}{space}; {remedy} or choose another place, then run the same command again"
    )


def _space(final: Path) -> str:
    """What was written of a file when space ran out, and what is left."""
    folder = next(parent for parent in final.absolute().parents if parent.is_dir())
    try:
        beside = (path for path in folder.iterdir() if path.name.startswith(f"{final.name}."))
        written = sum(path.stat().st_size for path in beside if path.suffix == TEMP_SUFFIX)
        free = shutil.disk_usage(folder).free
    except OSError:  # other threads take theirs away
        return ""
    return f" ({written:,} bytes of it were written, {free:,} are free there)"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
