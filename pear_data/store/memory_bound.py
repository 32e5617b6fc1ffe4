"""A bound on the memory of this process, for libraries that keep to none of their own."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

_DATA = re.compile(r"^VmData:\s*([0-9]+) kB$", re.MULTILINE)


@contextlib.contextmanager
def memory_bound(more: int) -> Iterator[None]:
    """Let the process take this many bytes more than it has; an allocation beyond them fails. A lower bound stays."""
    found = _DATA.search(Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [int(found[1]) * 1024 + more, before, hard]
    lowest = min(bound for bound in bounds if bound != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))
