"""Files and folders that only their owner sees while they are made; how open they are in the end the umask says."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

_UMASK = re.compile(r"^Umask:\s*([0-7]+)$", re.MULTILINE)


def create_private(path: Path) -> None:
    """Make a new, empty file that nobody else can open, whatever the umask.

    Raises:
        FileExistsError: something is there, be it a link that somebody planted.
        OSError: the disk refused.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))


def private_folder(path: Path) -> None:
    """Make a folder that nobody else can enter, or find the one that an earlier run of this user left.

    Raises:
        FileExistsError: what is there is a link, no folder, or somebody else's.
        OSError: the disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        there = path.lstat()
        if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid():
            raise
        path.chmod(0o700)


def open_to_others(path: Path) -> None:
    """Give a finished file or folder the mode it would have had from the start."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        full = 0o777 if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 0o666
        os.fchmod(descriptor, full & ~_umask())
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The umask of this process, read without setting it: other threads make files meanwhile."""
    found = _UMASK.search(Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None  # since Linux 4.7
    return int(found[1], 8)
