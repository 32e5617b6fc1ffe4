"""A stage's work with its log: what it reports goes on to whoever watches, and into STORE/logs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, ParamSpec, TypeVar

from pear_data import __version__
from pear_data.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, EXIT_QUARANTINED, PearError
from pear_data.invocation import command
from pear_data.progress import OneAtATime, Outcome, Progress
from pear_data.redaction import redacted
from pear_data.schema import STATUS_OK, STATUS_UNSCORED
from pear_data.store import Store
from pear_data.store.log import (
    LONGEST_TEXT,
    Counting,
    Ended,
    Event,
    Lost,
    Said,
    ShardDone,
    StageLog,
    Started,
)
from pear_data.store.manifest import CORPUS, Shard

Outcomes = TypeVar("Outcomes", Outcome, list[Outcome])
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

TEXTS_PER_SHARD = 20


def logged(
    store: Store, keys: Sequence[str], progress: Progress, work: Callable[[Progress], Outcomes]
) -> Outcomes:
    """The outcome of `work` on the stages `keys`, to which it reports; the caller holds the store's lock.

    Raises:
        PearError: the log cannot be written.
        BaseException: what `work` raises.
    """
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        logs = []
        for key in keys:
            logs.append(log := StageLog(store.path, key))
            stack.callback(log.close)
            if log.last is not None and not isinstance(log.last, Ended):
                log.add(Lost(last=log.last.time))
            log.add(Started(command=command.get(), version=__version__, process=os.getpid()))
        try:
            outcomes = work(OneAtATime(_LoggedProgress(store, dict(zip(keys, logs, strict=True)), progress)))
        except BaseException as error:
            with contextlib.suppress(PearError):  # the error tells more
                _end(logs, *_failure(error), time.monotonic() - start)
            raise
        for log, outcome in zip(logs, [outcomes] if isinstance(outcomes, Outcome) else outcomes, strict=True):
            code = EXIT_QUARANTINED if outcome.rejected else EXIT_OK
            _end([log], "done", code, outcome.summary, time.monotonic() - start)
        return outcomes


@dataclass(frozen=True, slots=True)
class Took(Generic[Result]):
    """A result, how long it took and in which process."""

    result: Result
    seconds: float
    process: int


@dataclass(frozen=True, slots=True)
class Timed(Generic[Arguments, Result]):
    """`work` with its time; travels to other processes where `work` does."""

    work: Callable[Arguments, Result]

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Took[Result]:
        start = time.monotonic()
        return Took(self.work(*args, **kwargs), time.monotonic() - start, os.getpid())


def tokens_of(key: str, shard: Shard) -> int:
    """What a shard of the corpus counts in the work on stage `key`."""
    return shard.num_scored if key.startswith("weights/") else shard.num_tokens


def rejected(key: str, shard: Shard) -> int:
    """Rows of a shard of stage `key` that were set aside."""
    if key == CORPUS:
        return shard.quarantined
    if key.startswith("weights/"):
        return shard.counts.get(STATUS_UNSCORED, 0)
    return shard.rows - shard.counts.get(STATUS_OK, 0)


def _failure(error: BaseException) -> tuple[Literal["interrupted", "failed"], int, str]:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, PearError):
        return "failed", error.exit_code, str(error)
    return "failed", EXIT_ERROR, f"{type(error).__name__}: {error}"


def _end(
    logs: Sequence[StageLog],
    outcome: Literal["done", "interrupted", "failed"],
    code: int,
    text: str,
    seconds: float,
) -> None:
    for log in logs:
        log.add(Ended(outcome=outcome, exit_code=code, text=_kept(text), seconds=round(seconds, 3)))


def _kept(text: str) -> str:
    text = redacted(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."


class _LoggedProgress:
    """A `Progress` for one thread at a time."""

    def __init__(self, store: Store, logs: dict[str, StageLog], progress: Progress) -> None:
        self._store, self._logs, self._progress = store, logs, progress
        self._texts = 0
        # Shards that are there already, and tokens of the corpus's, by stage and name.
        self._there: dict[str, dict[str, Shard]] = {}
        self._tokens: dict[str, dict[str, int]] = {}

    def say(self, line: str) -> None:
        self._progress.say(line)
        self._text(Said(event="said", text=_kept(line)))

    def note(self, line: str) -> None:
        self._progress.note(line)
        self._text(Said(event="noted", text=_kept(line)))

    def begin(self, title: str, total: int | None, unit: str, *, done: int = 0) -> None:
        self._progress.begin(title, total, unit, done=done)
        stages = self._store.manifest.stages
        corpus = stages[CORPUS].shards if CORPUS in stages else []
        for key, log in self._logs.items():
            stage = stages.get(key)
            self._there[key] = {shard.name: shard for shard in stage.shards} if stage else {}
            self._tokens[key] = {shard.name: tokens_of(key, shard) for shard in corpus}
            mark = stage.fingerprint if stage else None
            log.add(Counting(what=title, unit=unit, total=total, done=done, fingerprint=mark))

    def advance(self, count: int) -> None:
        self._progress.advance(count)

    def shard(self, name: str, note: str, *, seconds: float | None = None, worker: int | None = None) -> None:
        self._progress.shard(name, note, seconds=seconds, worker=worker)
        for key, log in self._logs.items():
            entry = self._store.stage(key).shard(name)
            if entry is not None and entry is not self._there.get(key, {}).get(name):
                log.add(self._event(key, entry, seconds, worker))
        self._texts = 0

    def end(self) -> None:
        self._progress.end()

    def _text(self, event: Event) -> None:
        self._texts += 1
        if self._texts <= TEXTS_PER_SHARD:
            for log in self._logs.values():
                log.add(event)

    def _event(self, key: str, entry: Shard, seconds: float | None, worker: int | None) -> ShardDone:
        tokens = self._tokens[key].get(entry.name, tokens_of(key, entry))
        return ShardDone(
            shard=entry.name,
            samples=entry.rows,
            tokens=tokens,
            scored=entry.num_scored,
            rejected=rejected(key, entry),
            seconds=None if seconds is None else round(seconds, 3),
            tokens_per_second=None if not seconds else round(tokens / seconds, 1),
            worker=None if worker == os.getpid() else worker,
            unsaid=max(0, self._texts - TEXTS_PER_SHARD),
        )
