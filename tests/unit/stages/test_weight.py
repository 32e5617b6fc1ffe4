"""The weight stage against the kernels run sample by sample, and what makes it redo or refuse."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pear_data import importance_weights, open_store
from pear_data.config import WeightSettings
from pear_data.errors import MismatchError, UsageError
from pear_data.progress import Silent
from pear_data.stages.weight import weight
from pear_data.store import writable_store


def run(folder, *, overwrite=False, **settings):
    with writable_store(folder) as store:
        return weight(store, WeightSettings(**settings), Silent(), overwrite=overwrite)


def rows(folder, name):
    return open_store(folder).weights[name].to_table().to_pylist()


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_weights_and_summaries_are_those_of_each_sample(make_store, samples, level):
    folder = make_store(samples)
    outcome = run(folder, level=level, gamma=0.99, block_size=3)
    assert outcome.rejected == 0
    got = rows(folder, level)
    assert [row["sample_id"] for row in got] == [sample.sample_id for sample in samples]
    for row, sample in zip(got, samples, strict=True):
        want = importance_weights(
            sample.initial, sample.behavior, [len(sample.initial)], level=level, gamma=0.99, block_size=3
        )
        log_ratio = sample.initial.astype(np.float64) - sample.behavior
        np.testing.assert_array_equal(np.float32(row["weights"]), want)
        assert row["num_scored"] == len(want)
        wide = want.astype(np.float64)
        assert row["log_ratio_sum"] == pytest.approx(log_ratio.sum(), rel=1e-12)
        assert row["weight_mean"] == pytest.approx(wide.mean(), rel=1e-12)
        assert (row["weight_min"], row["weight_max"]) == (want.min(), want.max())
        assert row["ess"] == pytest.approx(wide.sum() ** 2 / (wide**2).sum(), rel=1e-12)
        assert row["clipped_low"] == (log_ratio < -0.08).sum()
        assert row["clipped_high"] == (log_ratio > 0.3).sum()
        assert row["status"] == "ok"


def test_negatives_are_dropped_or_get_their_sequence_weight_times_minus_lambda(make_store, samples):
    for index in (0, 8, 19):
        samples[index].label = -1
    folder = make_store(samples)
    run(folder, level="token", name="dropped")
    run(folder, level="token", name="pushed", negative_scale=0.5)
    for index, (dropped, pushed) in enumerate(
        zip(rows(folder, "dropped"), rows(folder, "pushed"), strict=True)
    ):
        sample = samples[index]
        if sample.label > 0:
            assert dropped["weights"] == pushed["weights"]
            continue
        assert dropped["status"] == "dropped"
        assert set(dropped["weights"]) == {0.0}
        assert not np.signbit(dropped["weights"]).any()
        assert dropped["ess"] == 0
        sequence = importance_weights(
            sample.initial, sample.behavior, [len(sample.initial)], level="sequence"
        )
        assert pushed["status"] == "ok"
        np.testing.assert_array_equal(np.float32(pushed["weights"]), np.float32(-0.5) * sequence)


def test_rows_a_policy_could_not_score_have_no_weights(make_store, samples):
    samples[3].initial_status = "too_long"
    samples[4].behavior_status = "nonfinite"
    for sample in samples[14:]:
        sample.behavior_status = "nonfinite"
    folder = make_store(samples)
    assert run(folder).rejected == 8
    got = rows(folder, "block")
    assert [row["status"] for row in got] == ["ok"] * 3 + ["unscored"] * 2 + ["ok"] * 9 + ["unscored"] * 6
    assert got[3]["weights"] is got[3]["ess"] is got[3]["clipped_low"] is None
    assert len(got[2]["weights"]) == len(samples[2].initial)
    weighted = sum(len(row["weights"]) for row in got if row["status"] == "ok")
    assert open_store(folder).stage("weights/block").num_scored == weighted


def test_weightings_live_side_by_side(make_store, samples):
    folder = make_store(samples)
    run(folder, level="block")
    run(folder, level="block", name="tight", clip_log_ratio=(-0.01, 0.01))
    assert list(open_store(folder).weights) == ["block", "tight"]
    assert rows(folder, "block") != rows(folder, "tight")


def test_the_same_again_does_nothing_and_other_settings_are_refused(make_store, samples):
    folder = make_store(samples)
    run(folder)
    before = [(path, path.stat().st_mtime_ns) for path in sorted((folder / "weights").rglob("*.parquet"))]
    assert len(before) == 3
    run(folder)
    assert before == [(path, path.stat().st_mtime_ns) for path, _ in before]
    with pytest.raises(MismatchError, match=r"gamma: was 0\.999, now 0\.5"):
        run(folder, gamma=0.5)
    run(folder, gamma=0.5, overwrite=True)
    assert before != [(path, path.stat().st_mtime_ns) for path, _ in before]


def test_a_damaged_shard_alone_is_made_again(make_store, samples):
    folder = make_store(samples)
    run(folder)
    before = rows(folder, "block")
    path = folder / "weights" / "block" / "part-00001.parquet"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    untouched = (folder / "weights" / "block" / "part-00000.parquet").stat().st_mtime_ns
    run(folder)
    assert rows(folder, "block") == before
    assert (folder / "weights" / "block" / "part-00000.parquet").stat().st_mtime_ns == untouched


def test_scores_of_another_corpus_are_refused(make_store, samples):
    folder = make_store(samples)
    with writable_store(folder) as store:
        store.stage("scores/initial").shards[1].inputs["corpus"] = "0" * 64
        store.save()
    with pytest.raises(MismatchError, match="scores/initial .* was not made from the present corpus"):
        run(folder)


def test_misaligned_rows_are_refused(make_store, samples):
    folder = make_store(samples)
    with writable_store(folder) as store:
        shard = store.stage("scores/initial").shards[0]
        table = pa.concat_tables(store.row_groups(shard))
        swapped = table.take([1, 0, *range(2, len(table))])
        import pyarrow.parquet as pq

        pq.write_table(swapped, store.path / shard.file.path, row_group_size=3)
        shard.file = store.entry_of(store.path / shard.file.path)
        store.save()
    with pytest.raises(MismatchError, match="rows of scores/initial are not those of corpus"):
        run(folder)


def test_a_missing_or_unfinished_policy_is_named(make_store, samples):
    folder = make_store(samples)
    with pytest.raises(UsageError, match="score --policy other"):
        run(folder, behavior="other")
    with writable_store(folder) as store:
        store.stage("scores/initial").complete = False
        store.save()
    with pytest.raises(UsageError, match="scores/initial .* is not finished"):
        run(folder)
