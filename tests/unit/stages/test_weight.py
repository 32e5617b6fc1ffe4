"""The weight stage against the kernels run sample by sample, and what makes it redo or refuse."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pear_data import importance_weights, open_store
from pear_data.binning import bins_of
from pear_data.config import WeightSettings
from pear_data.errors import MismatchError, UsageError
from pear_data.progress import Silent
from pear_data.stages import source_totals
from pear_data.stages.weight import weight, weight_all
from pear_data.store import writable_store


def run(folder, *, overwrite=False, **settings):
    with writable_store(folder) as store:
        return weight(store, WeightSettings(**settings), Silent(), overwrite=overwrite)


def rows(folder, name):
    """Each sample's weights with its summary."""
    store = open_store(folder)
    parts = store.weights[name].to_table().to_pylist()
    summaries = [
        row
        for shard in store.stage(f"weights/{name}").shards
        for row in pq.read_table(store.file(shard.summary)).to_pylist()
    ]
    for part, summary in zip(parts, summaries, strict=True):
        assert (part["sample_id"], part["status"]) == (summary["sample_id"], summary["status"])
    return [part | summary for part, summary in zip(parts, summaries, strict=True)]


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
        assert row["weight_sum"] == pytest.approx(wide.sum(), rel=1e-12)
        assert row["weight_square_sum"] == pytest.approx((wide**2).sum(), rel=1e-12)
        assert (row["weight_min"], row["weight_max"]) == (want.min(), want.max())
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
        assert dropped["weight_square_sum"] == 0
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
    assert got[3]["weights"] is got[3]["weight_sum"] is got[3]["clipped_low"] is None
    assert len(got[2]["weights"]) == len(samples[2].initial)
    weighted = sum(len(row["weights"]) for row in got if row["status"] == "ok")
    assert open_store(folder).stage("weights/block").num_scored == weighted


def reference(
    sample, *, level="token", gamma=0.999, ratio=(-0.08, 0.3), bounds=(-10, 5), center=0.0, ends=None
):
    """Weights in float64, term by term as the paper has them."""
    d = sample.initial.astype(np.float64) - sample.behavior.astype(np.float64)
    d = np.clip(d - center, *ratio)
    length = len(d)
    if level == "sequence":
        return np.full(length, np.exp(np.clip(d.sum(), *bounds)))
    ends = range(1, length + 1) if ends is None else ends
    end_of = [next(end for end in ends if end > t) for t in range(length)]
    return np.exp([np.clip((length - end) * np.log(gamma) + d[end:].sum(), *bounds) for end in end_of])


def is_odd(index):
    """Sources alternate within each row group of 3 of a shard of 7."""
    return index % 7 % 3 % 2 == 1


def mean_log_ratio(samples):
    return np.concatenate([s.initial.astype(np.float64) - s.behavior for s in samples]).mean()


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_log_ratios_are_centered_before_the_clip(make_store, samples, level):
    folder = make_store(samples)
    run(folder, level=level, center="sample", name="own")
    run(folder, level=level, center="corpus", name="all")
    mean = mean_log_ratio(samples)
    assert open_store(folder).stage("weights/all").decisions["center"] == pytest.approx(mean, rel=1e-9)
    for sample, own, everyone in zip(samples, rows(folder, "own"), rows(folder, "all"), strict=True):
        ends = [*range(4, len(sample.initial), 4), len(sample.initial)] if level == "block" else None
        for row, center in ((own, mean_log_ratio([sample])), (everyone, mean)):
            want = reference(sample, level=level, center=center, ends=ends)
            np.testing.assert_allclose(row["weights"], want, rtol=1e-6)
            d = sample.initial.astype(np.float64) - sample.behavior
            assert row["log_ratio_sum"] == pytest.approx(d.sum(), abs=1e-12)
            assert row["clipped_low"] == (d - center < -0.08).sum()


def test_weights_are_scaled_to_a_mean_of_one(make_store, samples):
    samples[2].label = -1
    folder = make_store(samples)
    options = {"level": "token", "clip_log_weight": (-0.5, 0.5), "negative_scale": 0.5}
    run(folder, name="plain", **options)
    run(folder, normalize="sample", name="own", **options)
    run(folder, normalize="corpus", name="all", **options)
    plain, own, everyone = (rows(folder, name) for name in ("plain", "own", "all"))
    positive = np.concatenate([np.float64(row["weights"]) for i, row in enumerate(plain) if i != 2])
    for before, one, other in zip(plain, own, everyone, strict=True):
        weights = np.float64(before["weights"])
        np.testing.assert_allclose(
            one["weights"], weights / abs(weights.mean()) * (0.5 if before is plain[2] else 1), rtol=1e-6
        )
        np.testing.assert_allclose(other["weights"], weights / positive.mean(), rtol=1e-6)
        low = (abs(weights) <= np.float32(np.exp(-0.5))).sum()
        assert other["saturated_low"] == before["saturated_low"] == (0 if before is plain[2] else low)
    scale = open_store(folder).stage("weights/all").decisions["scale"]
    assert scale == pytest.approx(1 / positive.mean(), rel=1e-9)


def test_a_source_may_have_its_own_clips_and_discount(make_store, samples):
    folder = make_store(samples)
    own = {"odd": {"gamma": 0.9, "clip_log_ratio": (-0.5, 0.5), "clip_log_weight": (-1, 0.5)}}
    run(folder, level="token", per_source=own)
    for index, (sample, row) in enumerate(zip(samples, rows(folder, "token"), strict=True)):
        odd = {"gamma": 0.9, "ratio": (-0.5, 0.5), "bounds": (-1, 0.5)} if is_odd(index) else {}
        want = reference(sample, **odd)
        np.testing.assert_allclose(row["weights"], want, rtol=1e-6)
        low = np.float32(np.exp(odd.get("bounds", (-10, 5))[0]))
        assert row["saturated_low"] == (np.float32(row["weights"]) <= low).sum()
    with pytest.raises(UsageError, match="no sample is of source 'old'"):
        run(folder, level="token", per_source={"old": {"gamma": 1}}, name="other")


def test_baselines_need_no_behavior_policy(make_store, samples):
    samples[4].label = -1
    folder = make_store(samples)
    with writable_store(folder) as store:
        del store.manifest.stages["scores/behavior"]
        store.save()
    run(folder, level="uniform", negative_scale=0.5)
    run(folder, level="dft", negative_scale=0.5)
    for index, (sample, one, own) in enumerate(
        zip(samples, rows(folder, "uniform"), rows(folder, "dft"), strict=True)
    ):
        sign = -0.5 if index == 4 else 1
        assert set(one["weights"]) == {sign}
        np.testing.assert_allclose(
            own["weights"], sign * np.exp(sample.initial.astype(np.float64)), rtol=1e-6
        )
        assert one["log_ratio_sum"] is own["clipped_low"] is None
    assert "scores/behavior" not in open_store(folder).stage("weights/dft").settings["inputs"]
    with pytest.raises(UsageError, match="score --policy behavior"):
        run(folder)


def test_many_workers_write_what_one_writes(make_store, samples):
    folder = make_store(samples)
    options = {"level": "token", "center": "corpus", "normalize": "corpus"}
    run(folder, name="alone", workers=1, **options)
    run(folder, name="together", workers=2, **options)
    for tree in ("weights", "summary/weights"):
        alone, together = folder / tree / "alone", folder / tree / "together"
        names = sorted(path.name for path in alone.iterdir())
        assert names == sorted(path.name for path in together.iterdir())
        assert all((alone / name).read_bytes() == (together / name).read_bytes() for name in names)


@pytest.mark.parametrize("slots", [1, 32])
def test_levels_made_in_one_pass_are_those_made_alone(make_store, samples, monkeypatch, slots):
    monkeypatch.setattr(source_totals, "SLOTS", slots)
    samples[2].label = -1
    samples[5].behavior_status = "nonfinite"
    folder = make_store(samples)
    levels = ("token", "block", "sequence", "uniform", "dft")
    options = {"negative_scale": 0.5}
    with writable_store(folder) as store:
        weight_all(store, [WeightSettings(level=level, **options) for level in levels], Silent())
    for level in levels:
        run(folder, level=level, name=f"{level}-alone", **options)
        for tree in ("weights", "summary/weights"):
            together, alone = folder / tree / level, folder / tree / f"{level}-alone"
            assert all((alone / path.name).read_bytes() == path.read_bytes() for path in together.iterdir())
    own = {"per_source": {"odd": {"clip_log_ratio": (-0.5, 0.5)}}}
    with writable_store(folder) as store:
        mixed = [
            WeightSettings(level="token", name="own", **own),
            WeightSettings(level="block", name="plain"),
        ]
        weight_all(store, mixed, Silent())
    run(folder, level="block", name="plain-alone")
    for path in (folder / "summary/weights/plain").iterdir():
        assert path.read_bytes() == (folder / "summary/weights/plain-alone" / path.name).read_bytes()


def test_totals_are_sums_over_the_positive_samples_of_each_source(make_store, samples, monkeypatch):
    monkeypatch.setattr(source_totals, "SLOTS", 1)  # so that sources take turns
    samples[2].label = -1
    samples[5].behavior_status = "nonfinite"
    folder = make_store(samples)
    run(folder, level="block")
    store = open_store(folder)
    totals = [
        row
        for s in store.stage("weights/block").shards
        for row in pq.read_table(store.file(s.totals)).to_pylist()
    ]
    for source in ("even", "odd"):
        found = [row for row in totals if row["source"] == source]
        members = [
            (i, s, row)
            for i, (s, row) in enumerate(zip(samples, rows(folder, "block"), strict=True))
            if is_odd(i) == (source == "odd")
        ]
        kept = [(s, row) for i, s, row in members if i not in (2, 5)]
        assert sum(row["samples"] for row in found) == len(kept)
        assert sum(row["unscored"] for row in found) == (source == ("odd" if is_odd(5) else "even"))
        assert (
            sum(row["negatives"] for row in found)
            == sum(row["dropped"] for row in found)
            == (source == "even")
        )
        d = [s.initial.astype(np.float64) - s.behavior for s, _ in kept]
        w = [np.float32(row["weights"]) for _, row in kept]
        tenth = np.concatenate([np.arange(len(x)) * 10 // len(x) for x in d])
        for name, values in {
            "tokens": np.ones(len(tenth)),
            "weight_sum": np.concatenate(w).astype(np.float64),
            "weight_square_sum": np.concatenate(w).astype(np.float64) ** 2,
            "target_logprob_sum": np.concatenate([s.initial for s, _ in kept]).astype(np.float64),
            "behavior_logprob_sum": np.concatenate([s.behavior for s, _ in kept]).astype(np.float64),
            "log_ratio_square_sum": np.concatenate(d) ** 2,
            "clipped_low": np.concatenate(d) < -0.08,
            "clipped_high": np.concatenate(d) > 0.3,
        }.items():
            got = np.sum([row[name] for row in found], axis=0)
            np.testing.assert_allclose(
                got, np.bincount(tenth, values, 10), rtol=1e-12, atol=1e-12, err_msg=name
            )
        for quantity, values in {
            "log_ratio": np.concatenate(d),
            "weight": np.concatenate(w),
            "sample_weight": np.array([x.sum(dtype=np.float64) for x in w]),
        }.items():
            bins, counts = np.unique(bins_of(values.astype(np.float32)), return_counts=True)
            merged: dict[int, int] = {}
            for row in found:
                for one, count in zip(row[f"{quantity}_bins"], row[f"{quantity}_counts"], strict=True):
                    merged[one] = merged.get(one, 0) + count
            assert sorted(merged.items()) == list(zip(bins.tolist(), counts.tolist(), strict=True)), quantity
        assert min(row["log_ratio_min"] for row in found) == min(x.min() for x in d)
        assert max(row["weight_max"] for row in found) == max(x.max() for x in w)
        means = np.array([x.mean(dtype=np.float64) for x in w])
        assert sum(row["sample_mean_square_sum"] for row in found) == pytest.approx(
            (means**2).sum(), rel=1e-12
        )
        ratios = np.exp([2 * x.sum() for x in d]).sum()
        assert sum(row["sample_ratio_square_sum"] for row in found) == pytest.approx(ratios, rel=1e-9)


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
        pq.write_table(swapped, store.path / shard.file.path, row_group_size=3)
        shard.file = store.entry_of(store.path / shard.file.path)
        store.save()
    with pytest.raises(MismatchError, match="the stages differ in their rows"):
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


def test_what_fails_before_its_first_shard_leaves_nothing(make_store, samples):
    for sample in samples:
        sample.label = -1
    folder = make_store(samples)
    with pytest.raises(UsageError, match="no positive sample has a weight"):
        run(folder, normalize="corpus")
    assert "weights/block" not in open_store(folder).manifest.stages
    run(folder)
    with pytest.raises(MismatchError, match="normalize: was"):
        run(folder, normalize="corpus")
    assert open_store(folder).complete_stage("weights/block").shards


def test_a_block_may_be_larger_than_any_sample(make_store, samples):
    folder = make_store(samples)
    run(folder, block_size=2**31 - 1)
    assert all(set(row["weights"]) == {1.0} for row in rows(folder, "block"))
    flat = importance_weights(
        samples[0].initial, samples[0].behavior, [len(samples[0].initial)], block_size=2**63 - 1
    )
    assert set(flat.tolist()) == {1.0}
    with pytest.raises(ValidationError, match="block_size"):
        WeightSettings(block_size=2**31)
    with pytest.raises(ValidationError, match="block_size goes with block_by tokens"):
        WeightSettings(block_by="lines", block_size=9)
