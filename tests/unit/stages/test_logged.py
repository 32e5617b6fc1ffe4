"""What stages report ends up in their logs, bounded and without secrets, and tells how each run ended."""

from __future__ import annotations

import pytest

from pear_data.config import ScoreSettings, WeightSettings
from pear_data.errors import UsageError
from pear_data.invocation import command
from pear_data.progress import Outcome, Silent
from pear_data.stages.logged import TEXTS_PER_SHARD, Timed, logged
from pear_data.stages.score import score_policy
from pear_data.stages.weight import weight_all
from pear_data.store import writable_store
from pear_data.store.log import LONGEST_TEXT, Counting, Ended, Lost, Said, ShardDone, Started, read_log


@pytest.fixture
def folder(make_store, samples):
    return make_store(samples)


def events(folder, key):
    return list(read_log(folder, key))


def run(folder, work, keys=("scores/initial",)):
    with writable_store(folder) as store:
        return logged(store, keys, Silent(), work)


def test_a_weighting_logs_each_of_its_shards_once(folder):
    token = command.set("pear-data weight --name a")
    try:
        with writable_store(folder) as store:
            weight_all(store, [WeightSettings(name="a")], Silent())
            weight_all(store, [WeightSettings(name="a"), WeightSettings(level="token")], Silent())
            stages = store.manifest.stages
    finally:
        command.reset(token)
    first, counting, *_, again, _, nothing = events(folder, "weights/a")
    assert isinstance(first, Started)
    assert first.command == "pear-data weight --name a"
    assert isinstance(counting, Counting)
    assert counting.fingerprint == stages["weights/a"].fingerprint
    names = [shard.name for shard in stages["weights/a"].shards]
    done = [event for event in events(folder, "weights/a") if isinstance(event, ShardDone)]
    assert [event.shard for event in done] == names
    for event, shard, corpus in zip(done, stages["weights/a"].shards, stages["corpus"].shards, strict=True):
        assert (event.samples, event.tokens, event.scored) == (
            shard.rows,
            corpus.num_scored,
            shard.num_scored,
        )
        assert event.seconds >= 0
    assert [type(event) for event in events(folder, "weights/token")].count(ShardDone) == len(names)
    assert isinstance(again, Started)
    assert isinstance(nothing, Ended)
    assert (nothing.outcome, nothing.exit_code) == ("done", 0)


@pytest.mark.parametrize(
    ("error", "outcome", "code", "text"),
    [
        (KeyboardInterrupt(), "interrupted", 130, "interrupted"),
        (UsageError("give another"), "failed", 2, "give another"),
        (RuntimeError("broken"), "failed", 1, "RuntimeError: broken"),
    ],
)
def test_how_it_ended(folder, error, outcome, code, text):
    def work(progress):
        raise error

    with pytest.raises(type(error)):
        run(folder, work)
    last = events(folder, "scores/initial")[-1]
    assert (last.outcome, last.exit_code, last.text) == (outcome, code, text)


def test_rejected_rows_are_exit_code_3_of_their_stage_alone(folder):
    outcomes = [Outcome("all", 0), Outcome("two set aside", 2)]
    assert run(folder, lambda progress: outcomes, ("weights/a", "weights/b")) == outcomes
    assert [events(folder, f"weights/{name}")[-1].exit_code for name in "ab"] == [0, 3]


def test_a_run_that_was_killed_is_told_by_the_next(folder):
    def killed(progress):
        progress.say("about to die")
        raise SystemExit

    with pytest.raises(SystemExit):
        run(folder, killed)
    path = folder / "logs" / "scores" / "initial.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    run(folder, lambda progress: Outcome("done"))
    _, said, lost, *_ = events(folder, "scores/initial")
    assert isinstance(lost, Lost)
    assert lost.last == said.time
    run(folder, lambda progress: Outcome("done"))
    assert sum(isinstance(event, Lost) for event in events(folder, "scores/initial")) == 1


def test_texts_are_bounded_shown_ones_and_others(folder):
    seen = []

    class Screen(Silent):
        def say(self, line):
            seen.append(line)

    def work(progress):
        progress.note("only here")
        for index in range(100):
            progress.say(f"{index} " + "x" * 10_000)
        return Outcome("y" * 10_000)

    with writable_store(folder) as store:
        logged(store, ["scores/initial"], Screen(), work)
    kept = [event for event in events(folder, "scores/initial") if isinstance(event, Said)]
    assert [event.event for event in kept] == ["noted"] + ["said"] * (TEXTS_PER_SHARD - 1)
    assert len(seen) == 100
    assert all(
        len(line) <= LONGEST_TEXT + 200
        for line in (folder / "logs/scores/initial.jsonl").read_text().split("\n")
    )


def test_no_secret_is_kept(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hidden-in-the-environment")

    def work(progress):
        progress.say("401 for https://user:hidden@host/x?token=hidden")
        raise UsageError("hidden-in-the-environment is no token")

    with pytest.raises(UsageError):
        run(folder, work)
    assert "hidden" not in (folder / "logs/scores/initial.jsonl").read_text()


def test_a_scored_policy_logs_what_recorded_fields_said(folder):
    with writable_store(folder) as store, pytest.raises(UsageError, match="--from-field nothing"):
        score_policy(store, ScoreSettings(policy="p", from_field="nothing"), Silent())
    started, *_, ended = events(folder, "scores/p")
    assert isinstance(started, Started)
    assert ended.exit_code == 2
    assert "--from-field nothing" in ended.text


def test_timed_work_travels_and_tells_its_time():
    import pickle

    took = pickle.loads(pickle.dumps(Timed(len)))([1, 2])
    assert took.result == 2
    assert took.seconds >= 0
