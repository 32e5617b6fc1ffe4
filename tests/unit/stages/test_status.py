"""The state of stages, from manifest, log and lock: at work, stopped in every way, without a log, a damaged one."""

from __future__ import annotations

import fcntl
import os
from datetime import UTC, datetime, timedelta

import pytest

from pear_data import open_store
from pear_data.config import WeightSettings
from pear_data.progress import Silent
from pear_data.stages.status import store_status
from pear_data.stages.status_text import status_lines, status_table
from pear_data.stages.weight import weight
from pear_data.store import writable_store
from pear_data.store.lock import LOCK_NAME, holder
from pear_data.store.log import Counting, Ended, Lost, Said, ShardDone, StageLog, Started

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
KEY = "scores/initial"
COMMAND = "pear-data score --model m"


@pytest.fixture
def folder(make_store, samples):
    """Three shards, of which the initial policy lacks the last."""
    folder = make_store(samples)
    with writable_store(folder) as store:
        stage = store.stage(KEY)
        stage.shards, stage.complete = stage.shards[:-1], False
        store.save()
    return folder


def at(seconds):
    return NOW + timedelta(seconds=seconds)


def write_log(folder, *events, key=KEY):
    log = StageLog(folder, key)
    for event in events:
        log.add(event)
    log.close()


def started(seconds, process=1):
    return Started(time=at(seconds), command=COMMAND, version="1", process=process)


def counting(seconds):
    return Counting(time=at(seconds), what=KEY, unit="tokens", total=1, done=0, fingerprint=None)


def shard(seconds, tokens):
    name = "part-00000"
    numbers = {"samples": 7, "scored": 1, "rejected": 0, "seconds": 1.0, "tokens_per_second": 1.0}
    return ShardDone(time=at(seconds), shard=name, tokens=tokens, **numbers)


def ended(seconds, outcome, text=""):
    return Ended(time=at(seconds), outcome=outcome, exit_code=1, seconds=1, text=text)


def status_of(folder, key=KEY, seconds=0.0):
    return next(one for one in store_status(open_store(folder), at(seconds)).stages if one.stage == key)


def test_what_is_done_and_left_is_told_without_a_log(folder):
    for path in folder.rglob("*.jsonl"):
        path.unlink()
    status = store_status(open_store(folder), NOW)
    assert status.writer is None
    assert [one.stage for one in status.stages] == ["corpus", "scores/initial", "scores/behavior"]
    corpus, initial, behavior = status.stages
    assert (corpus.state, corpus.shards_done, corpus.shards_left, corpus.samples) == ("done", 3, 0, 20)
    assert (initial.state, initial.shards_done, initial.shards_left) == ("unfinished", 2, 1)
    tokens = [entry.num_tokens for entry in open_store(folder).stage("corpus").shards]
    assert (initial.tokens_done, initial.tokens_left) == (sum(tokens[:2]), tokens[2])
    assert initial.tokens_per_second is initial.seconds_left is initial.resume is None
    assert behavior.state == "done"
    assert "its log tells nothing" in " ".join(status_lines(status, NOW))


def test_speed_and_time_left_are_those_of_the_last_run_that_got_somewhere(folder):
    left = status_of(folder).tokens_left
    write_log(
        folder, started(-300), counting(-200), shard(-190, 100), shard(-180, 100), ended(-170, "failed")
    )
    assert status_of(folder).tokens_per_second == 10
    assert status_of(folder).seconds_left == left / 10
    write_log(folder, started(-100), counting(-90))
    assert status_of(folder).tokens_per_second == 10
    write_log(folder, shard(-80, 400))
    assert status_of(folder).tokens_per_second == 40
    assert status_of(folder).seconds_left == pytest.approx(left / 40, abs=0.1)


@pytest.mark.parametrize(
    ("events", "state", "line"),
    [
        ([started(-60), ended(-30, "interrupted")], "interrupted", "stopped 0:00:30 ago (interrupted)"),
        ([started(-60), ended(-30, "failed", "no GPU")], "failed", "ago (failed): no GPU"),
        (
            [started(-60), Said(event="said", text="x", time=at(-20))],
            "killed",
            "stopped 0:00:20 ago (killed)",
        ),
        ([started(-60), ended(-30, "done")], "unfinished", "ago (unfinished)"),
        ([Lost(last=at(-9)), started(-8), ended(-7, "interrupted")], "interrupted", "stopped 0:00:07 ago"),
    ],
)
def test_how_a_stage_stopped_and_how_it_goes_on(folder, events, state, line):
    write_log(folder, *events)
    status = store_status(open_store(folder), NOW)
    assert status_of(folder).state == state
    assert status_of(folder).resume == COMMAND
    lines = "\n".join(status_lines(status, NOW))
    assert line in lines
    assert f"  resume with: {COMMAND}" in lines
    assert lines.startswith("Nothing writes to this store now.")


def test_a_writer_at_work_is_told_with_its_command_and_stage(folder):
    write_log(
        folder, started(-60, os.getpid()), counting(-50), shard(-40, 100), Said(event="said", text="So.")
    )
    with (folder / LOCK_NAME).open("w") as lock:
        lock.write(str(os.getpid()))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = store_status(open_store(folder), NOW)
        assert status_of(folder).state == "running"
        assert status_of(folder).resume is None
        assert status_of(folder, seconds=1e6).seconds_left == 0
        write_log(folder, ended(-1, "done"))
        between = store_status(open_store(folder), NOW)
    assert (status.writer.process, status.writer.command, status.writer.stage) == (os.getpid(), COMMAND, KEY)
    assert "scores/initial, last said: So." in status_lines(status, NOW)
    assert (between.writer.command, between.writer.stage) == (COMMAND, None)
    assert store_status(open_store(folder), NOW).writer is None


def test_another_process_of_the_same_number_is_no_writer(folder, tmp_path):
    (folder / LOCK_NAME).write_text(str(os.getpid()))
    assert holder(folder) is None
    assert holder(folder, tmp_path / "nowhere") is None
    for content in ("", "not a number", "-1"):
        (folder / LOCK_NAME).write_text(content)
        assert holder(folder) is None


def test_a_shard_made_from_another_file_is_left(folder):
    with writable_store(folder) as store:
        weight(store, WeightSettings(target="behavior", behavior="other", level="uniform"), Silent())
        assert status_of(folder, "weights/uniform").state == "done"
        store.stage("scores/behavior").shards[0].file.sha256 = "0" * 64
        store.save()
    stage = status_of(folder, "weights/uniform")
    assert (stage.shards_done, stage.shards_left, stage.state) == (2, 1, "unfinished")
    tokens = sum(shard.num_scored for shard in open_store(folder).stage("corpus").shards[1:])
    assert stage.tokens_done == tokens


def test_a_stage_that_never_began_and_a_damaged_log_are_told(folder):
    write_log(folder, started(-60), ended(-50, "failed", "no such model"), key="scores/typo")
    with (folder / "logs" / "scores" / "typo.jsonl").open("ab") as file:
        file.write(b"\xff\n{}\n")
    (folder / "logs" / "other").mkdir()
    (folder / "logs" / "other" / "thing.jsonl").write_text("{}\n")
    status = store_status(open_store(folder), NOW)
    typo = status.stages[-2:]
    assert [one.stage for one in typo] == ["scores/behavior", "scores/typo"]
    assert (typo[1].state, typo[1].shards_done, typo[1].shards_left) == ("failed", 0, 3)
    assert typo[1].unreadable_lines == 2
    assert "scores/typo: 2 lines of its log cannot be read" in status_lines(status, NOW)
    assert status_table(status).row_count == 4
