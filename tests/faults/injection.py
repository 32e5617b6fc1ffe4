"""Faults put into the store's operations on the disk, one hook for all of them."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from pear_data.store import commit


@contextlib.contextmanager
def hooked(hook: Callable[[str, Path], None]) -> Iterator[None]:
    commit.on_operation = hook
    try:
        yield
    finally:
        commit.on_operation = None


@contextlib.contextmanager
def fail_at(number: int, code: int = errno.ENOSPC) -> Iterator[list[tuple[str, Path]]]:
    """The n-th operation fails as a full disk would; yields the operations up to there."""
    done: list[tuple[str, Path]] = []
    counting = threading.Lock()

    def fail(what: str, path: Path) -> None:
        with counting:
            if len(done) == number:  # other threads go on
                return
            done.append((what, path))
            if len(done) < number:
                return
        raise OSError(code, os.strerror(code))

    with hooked(fail):
        yield done


@contextlib.contextmanager
def crash_states(folder: Path, into: Path) -> Iterator[list[Path]]:
    """Before every operation `folder` is copied: what a process killed there leaves. Yields the copies so far."""
    states: list[Path] = []
    copying = threading.Lock()

    def keep(what: str, path: Path) -> None:
        with copying:
            state = into / f"{len(states):04d}"
            _copy(folder, state)
            states.append(state)

    with hooked(keep):
        yield states


def _copy(folder: Path, state: Path) -> None:
    """What other threads write meanwhile is on the disk before they enter it in the manifest, so that is read first."""
    for path in sorted(folder.rglob("*"), key=lambda path: path.name != "manifest.json"):
        to = state / path.relative_to(folder)
        if path.is_dir():
            to.mkdir(parents=True, exist_ok=True)
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            to.write_bytes(path.read_bytes())
