"""What a store's stages have done and have left, read from its manifest, logs and lock while others may write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pear_data.stages.logged import rejected, tokens_of
from pear_data.store import Store
from pear_data.store.lock import holder
from pear_data.store.log import LOGS, Counting, Ended, Event, Lost, Said, ShardDone, Started, read_log
from pear_data.store.manifest import CORPUS, Shard, Stage

State = Literal["done", "running", "interrupted", "failed", "killed", "unfinished"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Writer(_Model):
    """The process that writes to the store now."""

    process: int
    command: str | None
    stage: str | None = Field(description="What it works on; null before its first stage and between two.")


class StageStatus(_Model):
    """One stage. `tokens` are those of the corpus that its shards stand for; for weights, scored tokens."""

    stage: str
    state: State = Field(description="killed: its last run ended without a word, and no process works on it.")
    shards_done: int
    shards_left: int | None = Field(description="Null while the corpus is not complete.")
    samples: int
    rejected: int = Field(
        description="Rows quarantined, and samples that a policy or a weighting could not take."
    )
    tokens_done: int
    tokens_left: int | None
    inputs_done: int | None = Field(description="Of the corpus: files read to their end.")
    inputs: int | None
    tokens_per_second: float | None = Field(
        description="Over the last run, from its first shard to its last."
    )
    seconds_left: float | None = Field(description="At that speed; where nothing runs, once it is resumed.")
    last_event: datetime | None
    last_words: str | None = Field(description="What was said last, or how the last run ended.")
    resume: str | None = Field(
        description="The command that goes on, where nothing runs and something is left."
    )
    unreadable_lines: int = Field(description="Lines of the log that hold no event.")


class StoreStatus(_Model):
    """`pear-data status --format json`."""

    store: str
    writer: Writer | None = Field(description="Null where no process of this machine writes.")
    stages: list[StageStatus]


@dataclass(slots=True)
class _Run:
    """The last run on a stage, as its log tells."""

    started: Started | None = None
    ended: Ended | None = None
    last: datetime | None = None
    said: str | None = None
    unreadable: int = 0
    begun: datetime | None = None  # the count of tokens
    # Of the last count in which a shard was done, also where a later run has not got that far:
    since: datetime | None = None
    last_shard: datetime | None = None
    tokens: int = 0

    def take(self, event: Event | None) -> None:
        if event is None:
            self.unreadable += 1
            return
        self.last = event.time
        match event:
            case Started():
                self.started, self.ended, self.begun, self.said = event, None, None, None
            case Counting() if event.unit == "tokens":
                self.begun = event.time
            case ShardDone():
                if self.since != self.begun:
                    self.since, self.tokens = self.begun, 0
                self.tokens += event.tokens
                self.last_shard = event.time
            case Said(event="said"):
                self.said = event.text
            case Ended():
                self.ended, self.said = event, event.text
            case Lost():
                self.last = event.last

    @property
    def speed(self) -> float | None:
        """Tokens per second of the last run that finished a shard."""
        if self.since is None or self.last_shard is None:
            return None
        seconds = (self.last_shard - self.since).total_seconds()
        return self.tokens / seconds if seconds > 0 else None

    def in_work(self, now: datetime) -> float:
        """Seconds that the run at work has worked since its last shard, or its beginning."""
        since = max(filter(None, (self.last_shard, self.begun)), default=now)
        return max(0.0, (now - since).total_seconds())


def store_status(store: Store, now: datetime | None = None) -> StoreStatus:
    """The state of every stage that was begun, the corpus first."""
    now = now or datetime.now(UTC)
    process = holder(store.path)
    runs = {key: _run(store, key) for key in _keys(store)}
    at_work = [key for key, run in runs.items() if _is_at_work(run, process)]
    writer = None
    if process is not None:
        started = runs[at_work[0]].started if at_work else None
        command = started.command if started else _latest_command(runs, process)
        writer = Writer(process=process, command=command, stage=", ".join(at_work) or None)
    stages = [_stage_status(store, key, run, running=key in at_work, now=now) for key, run in runs.items()]
    return StoreStatus(store=str(store.path), writer=writer, stages=stages)


def _keys(store: Store) -> list[str]:
    """Stages in the manifest, and those whose log alone tells that somebody tried."""
    logs = store.path / LOGS
    logged = [path.relative_to(logs).with_suffix("").as_posix() for path in sorted(logs.rglob("*.jsonl"))]
    known = list(store.manifest.stages)
    keys = dict.fromkeys([*known, *(key for key in logged if key == CORPUS or key.count("/") == 1)])
    order = (CORPUS, "scores", "weights")
    return sorted(
        (key for key in keys if key.partition("/")[0] in order),
        key=lambda key: order.index(key.partition("/")[0]),
    )


def _run(store: Store, key: str) -> _Run:
    run = _Run()
    for event in read_log(store.path, key):
        run.take(event)
    return run


def _is_at_work(run: _Run, process: int | None) -> bool:
    return run.started is not None and run.ended is None and run.started.process == process


def _latest_command(runs: Mapping[str, _Run], process: int) -> str | None:
    """What a writer between two stages was started with."""
    own = [run.started for run in runs.values() if run.started and run.started.process == process]
    return max(own, key=lambda started: started.time).command if own else None


@dataclass(slots=True)
class _Work:
    """A stage's shards against those of the corpus."""

    done: list[Shard] = field(default_factory=list)
    tokens_done: int = 0
    shards_left: int | None = None
    tokens_left: int | None = None


def _work(store: Store, key: str, stage: Stage | None) -> _Work:
    stages = store.manifest.stages
    corpus = stages.get(CORPUS)
    if key == CORPUS:
        shards = stage.shards if stage else []
        left = 0 if stage and stage.complete else None
        return _Work(shards, sum(shard.num_tokens for shard in shards), left, left)
    known = {other: {shard.name: shard.file.sha256 for shard in one.shards} for other, one in stages.items()}
    # A shard made from other files than are there now is to be made again.
    current = {
        shard.name: shard
        for shard in (stage.shards if stage else [])
        if all(known.get(other, {}).get(shard.name) == sha256 for other, sha256 in shard.inputs.items())
    }
    wanted = corpus.shards if corpus else []
    done = sum(tokens_of(key, shard) for shard in wanted if shard.name in current)
    work = _Work(list(current.values()), done)
    if corpus and corpus.complete:
        work.shards_left = sum(shard.name not in current for shard in wanted)
        work.tokens_left = sum(tokens_of(key, shard) for shard in wanted) - done
    return work


def _stage_status(store: Store, key: str, run: _Run, *, running: bool, now: datetime) -> StageStatus:
    stage = store.manifest.stages.get(key)
    work = _work(store, key, stage)
    state = _state(stage, work, run, running=running)
    speed = run.speed
    inputs = stage.settings.get("inputs") if stage and key == CORPUS else None
    resumable = state not in ("done", "running") and run.started is not None
    return StageStatus(
        stage=key,
        state=state,
        shards_done=len(work.done),
        shards_left=work.shards_left,
        samples=sum(shard.rows for shard in work.done),
        rejected=sum(rejected(key, shard) for shard in work.done),
        tokens_done=work.tokens_done,
        tokens_left=work.tokens_left,
        inputs_done=_inputs_done(stage) if inputs is not None else None,
        inputs=len(inputs) if isinstance(inputs, list) else None,
        tokens_per_second=None if speed is None else round(speed, 1),
        seconds_left=_seconds_left(work.tokens_left, speed, run, now, running=running),
        last_event=run.last,
        last_words=run.said,
        resume=run.started.command if resumable and run.started else None,
        unreadable_lines=run.unreadable,
    )


def _state(stage: Stage | None, work: _Work, run: _Run, *, running: bool) -> State:
    if running:
        return "running"
    if stage is not None and stage.complete and not work.shards_left:
        return "done"
    if run.started is None:
        return "unfinished"
    if run.ended is None:
        return "killed"
    return "unfinished" if run.ended.outcome == "done" else run.ended.outcome


def _inputs_done(stage: Stage | None) -> int:
    if stage is None or not stage.shards:
        return 0
    if stage.complete:
        return len(stage.settings["inputs"])
    cursor = stage.shards[-1].cursor
    return cursor.input if cursor else 0


def _seconds_left(
    tokens: int | None, speed: float | None, run: _Run, now: datetime, *, running: bool
) -> float | None:
    if tokens == 0:
        return 0.0
    if tokens is None or not speed:
        return None
    return round(max(0.0, tokens / speed - (run.in_work(now) if running else 0.0)), 1)
