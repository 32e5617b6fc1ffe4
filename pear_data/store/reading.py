"""What the system refuses to let us read, told apart from what is damaged."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from pear_data.errors import PearError

_REMEDIES = {
    errno.EMFILE: "raise the limit with `ulimit -n`",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs",
    errno.EACCES: "make it readable",
    errno.EPERM: "make it readable",
}


def is_refusal(error: OSError) -> bool:
    """Whether the system would not let us read, which says nothing about what is in the file."""
    return error.errno in _REMEDIES


def refused(path: Path, error: OSError) -> PearError:
    """What to tell where `path` cannot be read."""
    # Arrow's own text would name the path once more.
    reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
    remedy = _REMEDIES.get(error.errno or 0, "see that its disk is well")
    return PearError(f"cannot read {path}: {reason}; {remedy}, then run the same command again")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Reading a file that is not known to be damaged.

    Raises:
        PearError: the system would not let us, or the disk could not.
    """
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error
