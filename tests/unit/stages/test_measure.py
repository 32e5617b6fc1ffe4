"""Totals files merged over shards, and refused where they are not of the present log-probs."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest

from pear_data.binning import bins_of
from pear_data.config import WeightSettings
from pear_data.errors import MismatchError, UsageError
from pear_data.progress import Silent
from pear_data.schema import DECILES, WEIGHT_TOTALS
from pear_data.stages.measure import measure
from pear_data.stages.statistics import summarise
from pear_data.stages.weight import weight
from pear_data.store import open_store, writable_store
from pear_data.store.shards import parquet_shard, totals_path


def totals_table(sources, tokens=20_000, seed=0):
    """Totals of random numbers: what `weight` writes beside a shard."""
    random = np.random.default_rng(seed)
    rows = []
    for source in sources:
        log_ratio = random.normal(-0.05, 0.3, tokens).astype(np.float32)
        weights = random.lognormal(0, 1, tokens).astype(np.float32)
        row = {
            name: [1] * DECILES
            for name in WEIGHT_TOTALS.names
            if pa.types.is_list(WEIGHT_TOTALS.field(name).type)
        }
        row |= {name: 1 for name in WEIGHT_TOTALS.names if name not in row}
        row |= {
            "source": source,
            "log_ratio_min": log_ratio.min(),
            "log_ratio_max": log_ratio.max(),
            "weight_min": weights.min(),
            "weight_max": weights.max(),
        }
        for name, values in (("log_ratio", log_ratio), ("weight", weights), ("sample_weight", weights[:500])):
            row[f"{name}_bins"], row[f"{name}_counts"] = np.unique(bins_of(values), return_counts=True)
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=WEIGHT_TOTALS)


@pytest.fixture
def weighted(make_store, samples):
    """A store of the samples in three shards with the weighting block."""
    folder = make_store(samples)
    with writable_store(folder) as store:
        weight(store, WeightSettings(), Silent())
    return open_store(folder)


def replace_totals(store, tables):
    """Let every shard of the weighting have the totals in `tables`."""
    for shard, table in zip(store.stage("weights/block").shards, tables, strict=True):
        final = totals_path(store.path, "weights/block", shard.name)
        with parquet_shard(final, WEIGHT_TOTALS) as writer:
            writer.write(table)
        shard.totals = store.entry_of(final)


def test_shards_are_added_up_source_by_source(weighted):
    tables = [totals_table(names, seed=seed) for seed, names in enumerate((["b", "a"], ["a"], ["c", "a"]))]
    replace_totals(weighted, tables)
    found = measure(weighted, "block")
    assert list(found.sources) == ["b", "a", "c"]
    rows = [row for table in tables for row in table.to_pylist()]
    for source, totals in found.sources.items():
        mine = [row for row in rows if row["source"] == source]
        assert totals.samples == len(mine)
        assert totals.decile_weight.tolist() == [float(len(mine))] * DECILES
        assert totals.statuses == {"ok": len(mine), "unscored": len(mine), "dropped": len(mine)}
        assert totals.weights.minimum == min(row["weight_min"] for row in mine)
        assert totals.log_ratios.maximum == max(row["log_ratio_max"] for row in mine)
        for histogram, name in (
            (totals.weights, "weight"),
            (totals.log_ratios, "log_ratio"),
            (totals.sample_weights, "sample_weight"),
        ):
            bins = np.concatenate([row[f"{name}_bins"] for row in mine])
            counts = np.concatenate([row[f"{name}_counts"] for row in mine])
            expected = np.bincount(bins, counts)
            assert histogram.counts.tolist() == expected[expected > 0].tolist()
    whole = found.whole()
    assert whole.weights.total == sum(sum(row["weight_counts"]) for row in rows)
    assert whole.tokens == len(rows) * DECILES


def test_no_token_is_read(weighted):
    before = measure(weighted, "block").whole()
    for kind in ("corpus", "scores/initial", "scores/behavior", "weights/block"):
        for path in (weighted.path / kind).glob("*.parquet"):
            path.unlink()
    after = measure(open_store(weighted.path), "block").whole()
    assert (after.tokens, after.weight) == (before.tokens, before.weight)


def test_ten_shards_of_ten_sources_take_no_time(make_store, samples):
    folder = make_store([*samples, *samples, *samples, *samples[:10]])
    with writable_store(folder) as store:
        weight(store, WeightSettings(), Silent())
        names = [f"source {number}" for number in range(10)]
        replace_totals(store, [totals_table(names, 200_000, seed) for seed in range(10)])
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            summarised = measure(store, "block")
            seconds.append(time.perf_counter() - start)
        assert len(summarised.sources) == 10
        # A bound for a busy machine: an idle one takes a tenth of it.
        assert min(seconds) < 0.5


def test_what_cannot_be_measured_is_refused(weighted):
    with pytest.raises(UsageError, match=r"weights/token.*have: block"):
        measure(weighted, "token")
    stage = weighted.stage("weights/block")
    stage.complete = False
    with pytest.raises(UsageError, match="not finished"):
        measure(weighted, "block")
    stage.complete = True
    path = weighted.path / stage.shards[1].totals.path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\0")
    with pytest.raises(MismatchError, match=r"part-00001.totals.parquet does not match its sha256"):
        measure(weighted, "block")
    path.write_bytes(content)
    stage.shards[1].totals = None
    with pytest.raises(MismatchError, match="run `pear-data migrate --store"):
        measure(weighted, "block")
    stage.shards[0].inputs["scores/behavior"] = "0" * 64
    with pytest.raises(MismatchError, match="was not made from the present scores/behavior"):
        measure(weighted, "block")


def test_totals_of_another_schema_are_refused(weighted):
    (shard, *_) = weighted.stage("weights/block").shards
    final = totals_path(weighted.path, "weights/block", shard.name)
    table = totals_table(["a"]).drop_columns(["negatives"])
    with parquet_shard(final, table.schema) as writer:
        writer.write(table)
    shard.totals = weighted.entry_of(final)
    with pytest.raises(MismatchError, match="other columns than totals have"):
        measure(weighted, "block")


def test_a_source_without_weights_is_counted(make_store, samples):
    for sample in samples:
        sample.initial_status = "nonfinite"
    folder = make_store(samples)
    with writable_store(folder) as store:
        weight(store, WeightSettings(), Silent())
    store = open_store(folder)
    found = measure(store, "block")
    assert found.whole().statuses == {"unscored": 20}
    assert summarise(store, found).corpus.ess is None
