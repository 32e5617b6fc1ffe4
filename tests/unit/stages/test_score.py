"""The score stage with an engine that misbehaves on purpose: what is stored, what is kept, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import pear_data.store.commit as commit
from pear_data import open_store
from pear_data.config import ScoreSettings
from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.progress import Silent
from pear_data.stages.score import score
from pear_data.stages.sources import engine_source
from pear_data.store import writable_store


class FaultyEngine:
    """Log-prob of a token is -(id + position in sample / 100); `spoil` maps a sample id to what it gives instead."""

    name = "faulty"
    batch_tokens = 64
    max_length = 30

    def __init__(self, spoil=None, fail_on=None, model="m"):
        self.spoil, self.fail_on, self.model = spoil or {}, fail_on, model
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
        return values

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
    outcome = run(folder, FaultyEngine())
    too_long = [len(sample.input_ids) > FaultyEngine.max_length for sample in samples]
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
    run(folder, FaultyEngine(), max_length=limit)
    for row, sample in zip(rows(folder), samples, strict=True):
        assert row["status"] == ("ok" if len(sample.input_ids) <= limit else "too_long")


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_nonfinite_values_are_null_with_a_status(folder, samples, value):
    run(folder, FaultyEngine({"s1": value, "s4": value}))
    for row, sample in zip(rows(folder), samples, strict=True):
        if sample.sample_id in ("s1", "s4"):
            assert row["status"] == "nonfinite"
            assert row["logprobs"] is row["logprob_sum"] is None
        elif row["status"] == "ok":
            assert np.isfinite(row["logprobs"]).all()


def test_an_engine_that_dies_loses_only_its_shard(folder):
    first = FaultyEngine(fail_on="s15")
    with pytest.raises(RuntimeError, match="the engine died"):
        run(folder, first)
    store = open_store(folder)
    assert [shard.name for shard in store.stage("scores/new").shards] == ["part-00000", "part-00001"]
    with pytest.raises(UsageError, match="not finished"):
        store.complete_stage("scores/new")
    second = FaultyEngine()
    run(folder, second)
    assert not {f"s{index}" for index in range(14)} & set(second.scored)
    whole = rows(folder)
    with writable_store(folder) as store:
        del store.manifest.stages["scores/new"]
        store.save()
    run(folder, FaultyEngine())
    assert rows(folder) == whole


def test_every_failing_write_is_survived(folder, monkeypatch):
    run(folder, FaultyEngine())
    whole = rows(folder)
    with writable_store(folder) as store:
        del store.manifest.stages["scores/new"]
        store.save()
    for attempt in range(1, 50):
        left = attempt

        def fail_at_the_nth(path):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(commit, "on_write", fail_at_the_nth)
        try:
            run(folder, FaultyEngine())
            break
        except PearError:
            pass
        finally:
            monkeypatch.setattr(commit, "on_write", None)
        assert not list(folder.rglob("*.tmp"))
    assert attempt > 3
    assert rows(folder) == whole


def test_another_model_under_the_same_name_is_refused(folder):
    run(folder, FaultyEngine())
    with pytest.raises(MismatchError, match='model: was "m", now "other"'):
        run(folder, FaultyEngine(model="other"))


def test_wrong_number_of_values_is_never_stored(folder):
    engine = FaultyEngine()
    good = engine.score
    engine.score = lambda batch, on_tokens: good(batch, on_tokens)[:-1]
    with pytest.raises(PearError, match="log-probs for"):
        run(folder, engine)
    assert not open_store(folder).stage("scores/new").shards
