"""One writer at a time, by an advisory lock the kernel drops when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pear_data.errors import PearError
from pear_data.store.commit import make_folder

LOCK_NAME = ".lock"


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the writer's lock of a folder, which is made where it is missing.

    Raises:
        PearError: another process holds it, named by its process id (nothing waits), or the folder cannot be
            written to.
    """
    try:
        make_folder(folder)
        opened = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise PearError(f"cannot write to {folder} ({error.strerror}): choose another place") from error
    with os.fdopen(opened, "ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            raise PearError(
                f"{folder} is being written by process {holder}: wait for it, or choose another place"
            ) from None
        except OSError as error:
            raise PearError(f"cannot lock {folder} ({error.strerror}): choose another place") from error
        if not _is_still_there(file, folder / LOCK_NAME):
            raise PearError(f"{folder} was just finished by another process: run the same command again")
        with contextlib.suppress(OSError):  # the lock holds without its holder's name
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


def _is_still_there(file: IO[bytes], path: Path) -> bool:
    """Whether `file`, by now locked, is what others find at `path`: who had it before may have taken it away."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def holder(folder: Path, locks: Path = Path("/proc/locks")) -> int | None:
    """Process id of the writer at work in a folder, as it calls itself; None where there is none on this machine.

    Nothing is locked for it: a writer that begins meanwhile must not be turned away.
    """
    try:
        path = folder / LOCK_NAME
        there, name = path.stat(), path.read_bytes().decode().strip()
        held = locks.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    device = f"{os.major(there.st_dev):02x}:{os.minor(there.st_dev):02x}:{there.st_ino}"
    for line in held:
        # 1: FLOCK  ADVISORY  WRITE 9688 fe:00:2238080 0 EOF
        fields = line.split()
        if "FLOCK" in fields and name.isdecimal() and len(fields) >= 6:
            # Some file systems give files another device than themselves.
            same_inode = fields[-3].rpartition(":")[2] == str(there.st_ino)
            if fields[-3] == device or (same_inode and fields[-4] == name):
                return int(name)
    return None
