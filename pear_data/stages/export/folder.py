"""The folder of an export: filled beside its place, renamed into it when whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from pear_data.errors import PearError
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
    partial = out.absolute().with_name(f".{out.absolute().name}{PARTIAL_SUFFIX}")
    try:
        private_folder(partial)
    except OSError as error:
        raise PearError(
            f"cannot write {partial}: {error.strerror}; remove it or choose another OUT"
        ) from error
    with exclusive(partial):
        for leftover in partial.iterdir():
            if leftover.name != LOCK_NAME:
                leftover.unlink()
        try:
            yield partial
            (partial / LOCK_NAME).unlink()
            open_to_others(partial)
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise PearError(f"cannot write {out}: {error.strerror}; choose another OUT") from error
            raise
