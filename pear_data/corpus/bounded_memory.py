"""A bound on the memory that decoding an untrusted file may take, whatever the file says of itself.

Sizes in a file's own metadata can lie, and encodings multiply: ten bytes may stand for a billion values. So the kernel
refuses memory instead, which Arrow reports as an error.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

# Arrow's allocator reserves 1 GiB of addresses at a time before it uses them.
DECODING_BYTES = 3 << 30
_STATM = Path("/proc/self/statm")


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Lets this process map at most `DECODING_BYTES` more inside the block, less where it is under a limit already.

    The limit holds for all threads; without /proc there is none.

    Raises:
        MemoryError: inside the block, from whatever asks for more.
    """
    if not _STATM.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(_STATM.read_text().split()[0]) * resource.getpagesize() + DECODING_BYTES
    stricter = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([bound, *stricter]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
