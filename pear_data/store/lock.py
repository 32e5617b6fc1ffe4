"""One writer at a time, by an advisory lock the kernel drops when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pear_data.errors import PearError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the writer's lock of a folder, which is made where it is missing.

    Raises:
        PearError: another process holds it, named by its process id (nothing waits), or the folder cannot be
            written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise PearError(f"cannot write to {folder} ({error.strerror}): choose another place") from error
    with os.fdopen(opened, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise PearError(
                f"{folder} is being written by process {holder}: wait for it, or choose another place"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
