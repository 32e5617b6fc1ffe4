"""How this process treats memory that was freed."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.abc import MetaPathFinder

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_ON_HEAP = 32 << 20  # bytes; glibc takes no more
_NEVER = 2**31 - 1
_LARGE = 1 << 20


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks of up to 32 MiB for the next tensor instead of giving them back.

    A forward pass on a CPU frees and allocates megabytes by the thousand, and taking their pages anew each time cost a
    tenth of the time in float32, a sixth in bfloat16. Other C libraries than glibc are left alone.
    """
    _mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP)
    _mallopt(_M_TRIM_THRESHOLD, _NEVER)


def stay_small() -> None:
    """For a process of our own that reads and writes Parquet in threads; to be called before Arrow is loaded.

    All threads and Arrow take memory from one heap, for each thread's keeps what it once needed, and so does Arrow's
    own allocator; and large blocks go back when they are freed: 80 MB. Pandas counts as not installed, because Arrow
    would load it with its first array: 60 MB.
    """
    take_arrow_memory_from_heap()
    _mallopt(_M_ARENA_MAX, 1)
    _mallopt(_M_MMAP_THRESHOLD, _LARGE)
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _NoPandas())


def take_arrow_memory_from_heap() -> None:
    """Of Arrow alone, and also in processes begun from here on; what users set stays."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


class _NoPandas(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is not loaded here", name=fullname)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
