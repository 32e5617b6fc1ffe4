"""Samples that failed are scored again, and nothing else is."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_data.config import ScoreSettings, WeightSettings
from pear_data.errors import MismatchError
from pear_data.progress import Silent
from pear_data.runners.base import Scored
from pear_data.stages.alignment import outdated
from pear_data.stages.rescore import rescore, rescore_policy
from pear_data.stages.score import score
from pear_data.stages.sources import engine_source
from pear_data.stages.verify import verify
from pear_data.stages.weight import weight
from pear_data.store import open_store, writable_store

KEY = "scores/new"


class Scorer:
    """Every log-prob is `value`; `failures` cannot be scored and `nonfinite` come out so."""

    name, batch_tokens, max_length = "s", 64, 30

    def __init__(self, value=-1.0, failures=(), nonfinite=(), model="m"):
        self.value, self.failures, self.nonfinite, self.model = value, failures, nonfinite, model
        self.scored = []

    def identity(self):
        return {"model": self.model}

    def score(self, batch, on_tokens):
        self.scored += batch.sample_ids
        values = np.full(batch.scored_offsets[-1], self.value, dtype=np.float32)
        for row, sample_id in enumerate(batch.sample_ids):
            if sample_id in self.nonfinite:
                values[batch.scored_offsets[row]] = np.nan
        return Scored(values, {r: "it died" for r, i in enumerate(batch.sample_ids) if i in self.failures})


@pytest.fixture
def folder(make_store, samples):
    """Scored with failures in the first and the last of three shards, among them some too long."""
    folder = make_store(samples)
    with writable_store(folder) as store:
        first = Scorer(failures=("s1", "s2", "s19"), nonfinite=("s4",))
        score(store, ScoreSettings(policy="new", model="m"), engine_source(first, None), Silent())
    return folder


def again(folder, scorer):
    with writable_store(folder) as store:
        return rescore(store, KEY, engine_source(scorer, None), Silent())


def rows(folder):
    return open_store(folder).scores["new"].to_table().to_pylist()


def quarantined(folder):
    store = open_store(folder)
    files = [store.file(shard.quarantine) for shard in store.stage(KEY).shards if shard.quarantine]
    found = pa.concat_tables(map(pq.read_table, files)).to_pylist() if files else []
    return [(row["input"], row["row"], row["reason"]) for row in found]


def test_failed_samples_alone_are_scored_again(folder):
    before = rows(folder)
    untouched = open_store(folder).stage(KEY).shards[1]
    scorer = Scorer(-2.0, failures=("s2",))
    outcome = again(folder, scorer)
    retried = ["s1", "s2", "s4", "s19"]
    assert sorted(scorer.scored) == sorted(retried)
    assert outcome.summary.startswith("3 of 4 samples are scored now; scores/new: ")
    too_long = sum(row["status"] == "too_long" for row in before)
    assert outcome.rejected == too_long + 1 > 1
    for old, new in zip(before, rows(folder), strict=True):
        if old["sample_id"] in retried and old["sample_id"] != "s2":
            assert new["status"] == "ok"
            assert new["logprobs"] == [-2.0] * old["num_scored"]
        else:
            assert new == old
    assert quarantined(folder) == [("part-00000.parquet", 2, "it died")]
    store = open_store(folder)
    assert store.stage(KEY).shards[1] == untouched
    verify(store, Silent())
    assert again(folder, Scorer(-2.0)).rejected == too_long
    assert quarantined(folder) == []


def test_where_nothing_failed_no_engine_starts(folder):
    again(folder, Scorer())
    with writable_store(folder) as store:
        outcome = rescore_policy(store, ScoreSettings(policy="new", model="/nowhere"), Silent())
    assert outcome.summary.startswith("no sample to score again; scores/new: ")


def test_another_model_is_refused(folder):
    before = rows(folder)
    with pytest.raises(MismatchError, match='model: was "m", now "other"'):
        again(folder, Scorer(model="other"))
    assert rows(folder) == before


def test_weightings_made_before_say_so_and_redo_what_changed(folder):
    settings = WeightSettings(target="new", workers=1)
    with writable_store(folder) as store:
        weight(store, settings, Silent())
        middle = store.stage("weights/block").shards[1]
    again(folder, Scorer())
    with writable_store(folder) as store:
        assert "was not made from the present scores/new" in outdated(store, "weights/block")
        weight(store, settings, Silent())
        assert outdated(store, "weights/block") is None
        assert store.stage("weights/block").shards[1] == middle


def test_killed_between_shards_the_rest_is_done_by_the_same_command(folder):
    class Killed(Scorer):
        def score(self, batch, on_tokens):
            if "s19" in batch.sample_ids:
                raise KeyboardInterrupt
            return super().score(batch, on_tokens)

    with pytest.raises(KeyboardInterrupt):
        again(folder, Killed())
    scorer = Scorer()
    assert again(folder, scorer).summary.startswith("1 of 1 samples are scored now")
    assert scorer.scored == ["s19"]
    verify(open_store(folder), Silent())
