"""The score stage with an engine that misbehaves on purpose: what is stored, what is kept, what is refused."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from pear_data import open_store
from pear_data.config import ScoreSettings
from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.progress import Silent
from pear_data.runners.base import Scored
from pear_data.stages.score import score
from pear_data.stages.sources import engine_source
from pear_data.stages.verify import verify
from pear_data.store import writable_store


class FaultyScorer:
    """Log-prob of a token is -(id + position in sample / 100); `spoil` maps a sample id to what it gives instead.

    It stops on sample `fail_on`, and cannot score those of `failures`, for the reasons given there.
    """

    name = "faulty"
    batch_tokens = 64
    max_length = 30

    def __init__(self, spoil=None, fail_on=None, model="m", failures=None):
        self.spoil, self.fail_on, self.model = spoil or {}, fail_on, model
        self.failures = failures or {}
        self.scored = []

    def identity(self):
        return {"engine": self.name, "model": self.model}

    def score(self, batch, on_tokens):
        assert len(batch) == 1 or batch.num_tokens.sum() <= self.batch_tokens
        assert batch.num_tokens.max() <= self.max_length
        if self.fail_on in batch.sample_ids:
            raise RuntimeError("the engine died")
        self.scored += batch.sample_ids
        position = np.arange(len(batch.input_ids)) - np.repeat(batch.offsets[:-1], batch.num_tokens)
        values = -(batch.input_ids + position / 100).astype(np.float32)[batch.loss_mask]
        for row, sample_id in enumerate(batch.sample_ids):
            if sample_id in self.spoil:
                values[batch.scored_offsets[row]] = self.spoil[sample_id]
        on_tokens(int(batch.num_tokens.sum()))
        failed = {
            row: self.failures[sample_id]
            for row, sample_id in enumerate(batch.sample_ids)
            if sample_id in self.failures
        }
        return Scored(values, failed)

    def close(self): ...


@pytest.fixture
def folder(make_store, samples):
    return make_store(samples)


def run(folder, engine, *, max_length=None, **settings):
    chosen = ScoreSettings(policy="new", model="m", **settings)
    with writable_store(folder) as store:
        return score(store, chosen, engine_source(engine, max_length), Silent())


def rows(folder):
    return open_store(folder).scores["new"].to_table().to_pylist()


def expected(sample):
    return (-(sample.input_ids + np.arange(len(sample.input_ids)) / 100)).astype(np.float32)[sample.loss_mask]


def test_each_value_lands_at_its_token_whatever_the_calls(folder, samples):
    outcome = run(folder, FaultyScorer())
    too_long = [len(sample.input_ids) > FaultyScorer.max_length for sample in samples]
    assert 0 < sum(too_long) < len(samples)
    assert outcome.rejected == sum(too_long)
    for row, sample, over in zip(rows(folder), samples, too_long, strict=True):
        assert row["num_scored"] == sample.loss_mask.sum()
        assert row["status"] == ("too_long" if over else "ok")
        if over:
            assert row["logprobs"] is row["logprob_sum"] is None
        else:
            np.testing.assert_array_equal(np.float32(row["logprobs"]), expected(sample))
            assert row["logprob_sum"] == pytest.approx(expected(sample).sum(dtype=np.float64), rel=1e-12)


def test_over_long_at_the_limit_exactly(folder, samples):
    lengths = sorted({len(sample.input_ids) for sample in samples if len(sample.input_ids) <= 30})
    limit = lengths[len(lengths) // 2]
    run(folder, FaultyScorer(), max_length=limit)
    for row, sample in zip(rows(folder), samples, strict=True):
        assert row["status"] == ("ok" if len(sample.input_ids) <= limit else "too_long")


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_nonfinite_values_are_null_with_a_status(folder, samples, value):
    run(folder, FaultyScorer({"s1": value, "s4": value}))
    for row, sample in zip(rows(folder), samples, strict=True):
        if sample.sample_id in ("s1", "s4"):
            assert row["status"] == "nonfinite"
            assert row["logprobs"] is row["logprob_sum"] is None
        elif row["status"] == "ok":
            assert np.isfinite(row["logprobs"]).all()


def test_an_engine_that_dies_loses_only_its_shard(folder):
    first = FaultyScorer(fail_on="s15")
    with pytest.raises(RuntimeError, match="the engine died"):
        run(folder, first)
    store = open_store(folder)
    assert [shard.name for shard in store.stage("scores/new").shards] == ["part-00000", "part-00001"]
    with pytest.raises(UsageError, match="not finished"):
        store.complete_stage("scores/new")
    second = FaultyScorer()
    run(folder, second)
    assert not {f"s{index}" for index in range(14)} & set(second.scored)
    whole = rows(folder)
    with writable_store(folder) as store:
        del store.manifest.stages["scores/new"]
        store.save()
    run(folder, FaultyScorer())
    assert rows(folder) == whole


def test_another_model_under_the_same_name_is_refused(folder):
    run(folder, FaultyScorer())
    with pytest.raises(MismatchError, match='model: was "m", now "other"'):
        run(folder, FaultyScorer(model="other"))


class Recorder(Silent):
    """Keeps what was said, and how many tokens were counted."""

    def __init__(self):
        self.said, self.tokens = [], 0

    def say(self, line):
        self.said.append(line)

    def advance(self, count):
        self.tokens += count


def test_failed_samples_are_quarantined_beside_the_scores(folder, samples):
    failures = {"s2": "out of memory", "s3": "it died", "s9": "it died"}
    progress = Recorder()
    with writable_store(folder) as store:
        source = engine_source(FaultyScorer(failures=failures), 39)
        outcome = score(store, ScoreSettings(policy="new", model="m"), source, progress)
        verify(store, Silent())
    too_long = {sample.sample_id for sample in samples if len(sample.input_ids) > FaultyScorer.max_length}
    assert not too_long & failures.keys()
    assert outcome.rejected == 3 + len(too_long)
    assert progress.tokens == sum(len(sample.input_ids) for sample in samples)
    for row in rows(folder):
        if row["sample_id"] in failures:
            assert row["status"] == "failed"
            assert row["logprobs"] is row["logprob_sum"] is None
        else:
            assert row["status"] == ("too_long" if row["sample_id"] in too_long else "ok")
    store = open_store(folder)
    found = [
        (shard.name, shard.quarantined, pq.read_table(store.file(shard.quarantine)).to_pylist())
        for shard in store.stage("scores/new").shards
        if shard.quarantine
    ]
    kept = {"input": "part-00000.parquet", "raw": b"{}"}
    assert found == [
        (
            "part-00000",
            2,
            [{**kept, "row": 2, "reason": "out of memory"}, {**kept, "row": 3, "reason": "it died"}],
        ),
        ("part-00001", 1, [{**kept, "input": "part-00001.parquet", "row": 2, "reason": "it died"}]),
    ]
    assert sorted(found_file.name for found_file in (folder / "quarantine").iterdir()) == [
        "scores-new-part-00000.parquet",
        "scores-new-part-00001.parquet",
    ]
    assert "s3 cannot be scored and is quarantined: it died" in progress.said


def test_a_shard_whose_quarantine_is_gone_is_scored_again(folder):
    run(folder, FaultyScorer(failures={"s2": "it died"}))
    (folder / "quarantine" / "scores-new-part-00000.parquet").unlink()
    again = FaultyScorer()
    run(folder, again)
    assert set(again.scored) <= {f"s{index}" for index in range(7)}
    assert {row["status"] for row in rows(folder)[:7]} <= {"ok", "too_long"}
    assert open_store(folder).stage("scores/new").shards[0].quarantine is None


def test_many_workers_store_what_one_does(folder):
    run(folder, FaultyScorer())
    whole = rows(folder)
    with writable_store(folder) as store:
        source = engine_source(FaultyScorer(), None, workers=3)
        del store.manifest.stages["scores/new"]
        score(store, ScoreSettings(policy="new", model="m"), source, Silent())
    assert rows(folder) == whole
    assert [shard.name for shard in open_store(folder).stage("scores/new").shards] == [
        f"part-{number:05d}" for number in range(3)
    ]


def test_an_error_in_one_thread_ends_the_others_and_keeps_what_is_committed(folder):
    closed = threading.Event()

    class Stuck(FaultyScorer):
        """Hangs in the first shard until it is closed, and fails in the third."""

        def score(self, batch, on_tokens):
            if {"s0", "s1", "s2"} & set(batch.sample_ids):
                assert closed.wait(30)
                raise PearError("closed")
            return super().score(batch, on_tokens)

    with writable_store(folder) as store:
        source = replace(engine_source(Stuck(fail_on="s15"), None, workers=2), close=closed.set)
        with pytest.raises(RuntimeError, match="the engine died"):
            score(store, ScoreSettings(policy="new", model="m"), source, Silent())
    assert not list(folder.rglob("*.tmp"))
    stage = open_store(folder).stage("scores/new")
    assert not stage.complete
    assert [shard.name for shard in stage.shards] == ["part-00001"]


def test_without_an_engine_to_end_the_others_stop_at_their_next_batch(folder):
    scored = []

    class Slow(FaultyScorer):
        """Fails in the second shard while the first is at its first row group."""

        def score(self, batch, on_tokens):
            if self.fail_on in batch.sample_ids:
                raise RuntimeError("the engine died")
            scored.append(batch.sample_ids)
            failed.wait(30)
            return super().score(batch, on_tokens)

    failed = threading.Event()
    with writable_store(folder) as store:
        source = replace(engine_source(Slow(fail_on="s8"), None, workers=2), close=failed.set)
        with pytest.raises(RuntimeError, match="the engine died"):
            score(store, ScoreSettings(policy="new", model="m"), source, Silent())
    assert len(scored) <= 2  # calls of the group that was at work
    assert not open_store(folder).stage("scores/new").shards


def test_the_workers_share_the_row_groups_of_a_single_shard(make_store, samples):
    folder = make_store(samples[:7])
    together = threading.Barrier(2, timeout=30)

    class Paired(FaultyScorer):
        batch_tokens = 1  # a call for each sample
        max_length = 39

        def score(self, batch, on_tokens):
            if batch.sample_ids[0] in ("s0", "s1"):
                together.wait()
            return super().score(batch, on_tokens)

    with writable_store(folder) as store:
        score(
            store, ScoreSettings(policy="new", model="m"), engine_source(Paired(), None, workers=2), Silent()
        )
    for row, sample in zip(rows(folder), samples[:7], strict=True):
        np.testing.assert_array_equal(np.float32(row["logprobs"]), expected(sample))
