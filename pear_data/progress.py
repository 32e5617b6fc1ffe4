"""How a stage tells people where it is; the command line draws it, programs may ignore it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage did. `rejected` rows are in the quarantine or carry a status other than ok (exit code 3)."""

    summary: str
    rejected: int = 0


class Progress(Protocol):
    """Where a stage reports to."""

    def say(self, line: str) -> None:
        """One line for people: what was recognised, chosen or set aside."""
        ...

    def note(self, line: str) -> None:
        """One line for the log alone: what people need only where they look for a cause."""
        ...

    def begin(self, title: str, total: int | None, unit: str, *, done: int = 0) -> None:
        """Start counting `unit`s up to `total` (None: unknown), `done` of which an earlier run did."""
        ...

    def advance(self, count: int) -> None:
        """`count` more units are done; fewer where it is negative, because work was lost."""
        ...

    def shard(self, name: str, note: str, *, seconds: float | None = None, worker: int | None = None) -> None:
        """A shard is committed, that took `seconds` in process `worker`."""
        ...

    def end(self) -> None:
        """The count that `begin` started is over."""
        ...


class Silent:
    """Reports to nobody."""

    def say(self, line: str) -> None: ...

    def note(self, line: str) -> None: ...

    def begin(self, title: str, total: int | None, unit: str, *, done: int = 0) -> None: ...

    def advance(self, count: int) -> None: ...

    def shard(
        self, name: str, note: str, *, seconds: float | None = None, worker: int | None = None
    ) -> None: ...

    def end(self) -> None: ...


class OneAtATime:
    """Passes on what several threads report, one call after the other."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        with self._lock:
            self._progress.say(line)

    def note(self, line: str) -> None:
        with self._lock:
            self._progress.note(line)

    def begin(self, title: str, total: int | None, unit: str, *, done: int = 0) -> None:
        with self._lock:
            self._progress.begin(title, total, unit, done=done)

    def advance(self, count: int) -> None:
        with self._lock:
            self._progress.advance(count)

    def shard(self, name: str, note: str, *, seconds: float | None = None, worker: int | None = None) -> None:
        with self._lock:
            self._progress.shard(name, note, seconds=seconds, worker=worker)

    def end(self) -> None:
        with self._lock:
            self._progress.end()
