"""The folder of an export: filled beside its place, renamed into it when whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pear_data.store.commit import make_folder, operation, sync_folder
from pear_data.store.lock import LOCK_NAME, exclusive
from pear_data.store.private import open_to_others, private_folder

PARTIAL_SUFFIX = ".pear_export"


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`; it becomes `out` when the block ends well and vanishes when it does not.

    Nobody else can enter it before it is `out`.

    Raises:
        PearError: another process is filling it, or the disk refused.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}{PARTIAL_SUFFIX}")
    with operation("make folder", partial):
        make_folder(out.parent)
        private_folder(partial)
    with exclusive(partial):
        try:
            with operation("remove leftovers", partial):
                _empty(partial)
            yield partial
            with operation("rename", out):
                open_to_others(partial)
                partial.rename(out)
        except BaseException:
            with contextlib.suppress(OSError):  # emptied by the next export
                _empty(partial)
                remove_lock(partial)
                partial.rmdir()
            raise
        sync_folder(out)
        # The lock moved along: taken away first, another process could begin to fill what is renamed above.
        with operation("remove", out / LOCK_NAME):
            remove_lock(out)


def remove_lock(folder: Path) -> None:
    """Take the lock out of a finished export, where it still is if its writer was killed at the last moment."""
    if (folder / LOCK_NAME).exists():
        (folder / LOCK_NAME).unlink(missing_ok=True)


def _empty(partial: Path) -> None:
    for leftover in partial.iterdir():
        if leftover.name != LOCK_NAME:
            leftover.unlink()
