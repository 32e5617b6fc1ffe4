"""STORE/logs/<stage>.jsonl: what happened to a stage, a line of JSON an event, written the moment it happens.

Lines are only ever added, each by one write. What a killed process wrote half of is a line of its own that readers pass
over. A shard takes a line of about 250 bytes and what is said meanwhile a bounded number of them: 25,000 shards take
about 6 MB, and can take 300 MB at most.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pear_data.store.commit import make_folder, operation

LOGS = "logs"
LONGEST_TEXT = 500  # characters; one that is longer is cut
_TAIL = 1 << 16  # bytes from the end in which the last event stands


def _now() -> datetime:
    return datetime.now(UTC)


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    time: datetime = Field(default_factory=_now, description="UTC.")


class Started(_Event):
    """A command began to work on the stage."""

    event: Literal["started"] = "started"
    command: str | None = Field(description="As somebody would give it again; null where a program called.")
    version: str = Field(description="Of pear-data.")
    process: int


class Lost(_Event):
    """The run before this one ended without a word: killed, or with its machine."""

    event: Literal["lost"] = "lost"
    last: datetime = Field(description="Time of its last event.")


class Counting(_Event):
    """A count of units began, some of which earlier runs did."""

    event: Literal["counting"] = "counting"
    what: str
    unit: str
    total: int | None
    done: int
    fingerprint: str | None = Field(description="Of the stage's settings in the manifest, once it is there.")


class Said(_Event):
    """What was said on the screen, or (`noted`) is only kept here."""

    event: Literal["said", "noted"]
    text: str


class ShardDone(_Event):
    """A shard is committed."""

    event: Literal["shard"] = "shard"
    shard: str
    samples: int
    tokens: int = Field(description="Tokens, prompt included (corpus, scores), or scored tokens (weights).")
    scored: int
    rejected: int = Field(description="Rows quarantined, and samples whose status is not what it should be.")
    seconds: float | None = Field(description="From its beginning to its commit, by one worker.")
    tokens_per_second: float | None
    worker: int | None = Field(None, description="Process that made it, where it was another one.")
    unsaid: int = Field(0, description="Texts since the last shard that are not kept here.")


class Ended(_Event):
    """The command is done with the stage."""

    event: Literal["ended"] = "ended"
    outcome: Literal["done", "interrupted", "failed"]
    exit_code: int
    seconds: float
    text: str = Field(description="The summary, or what went wrong.")


Event = Annotated[Started | Lost | Counting | Said | ShardDone | Ended, Field(discriminator="event")]
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)


def log_path(store: Path, key: str) -> Path:
    """Where the log of stage `key` lies."""
    return store / LOGS / f"{key}.jsonl"


class StageLog:
    """Adds events to the log of a stage; the caller holds the store's lock."""

    def __init__(self, store: Path, key: str) -> None:
        """Raises PearError where the disk refuses."""
        self._path = log_path(store, key)
        with operation("open", self._path):
            make_folder(self._path.parent)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            self._file = os.open(self._path, flags, 0o666)
        self.last = self._last()

    def add(self, event: Event) -> None:
        """Raises PearError where the disk refuses."""
        self._write(event.model_dump_json().encode() + b"\n")

    def close(self) -> None:
        """No event comes after this."""
        os.close(self._file)

    def _last(self) -> Event | None:
        """The last event that can be read; behind half a line a new one begins."""
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, _TAIL, max(0, size - _TAIL))
        if tail and not tail.endswith(b"\n"):
            self._write(b"\n")
        for line in reversed(tail.splitlines()):
            if (event := read_event(line)) is not None:
                return event
        return None

    def _write(self, line: bytes) -> None:
        with operation("append", self._path):
            written = os.write(self._file, line)
            if written < len(line):  # the rest says why
                os.write(self._file, line[written:])


def read_event(line: bytes) -> Event | None:
    """The event in a line, None where there is none: a torn line, or a later version's event."""
    try:
        return EVENTS.validate_json(line)
    except ValidationError:
        return None


def read_log(store: Path, key: str) -> Iterator[Event | None]:
    """The events of a stage in order, None for each line that is none; nothing where there is no log.

    It may be growing meanwhile: a last line without its end is not there yet.
    """
    with contextlib.suppress(FileNotFoundError), log_path(store, key).open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and line.strip():
                yield read_event(line)
