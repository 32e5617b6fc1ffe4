"""Weights and diagnostics of policies that were scored on tokens of their own, against the definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pear_data import importance_weights, open_store
from pear_data.config import WeightSettings
from pear_data.progress import Silent
from pear_data.stages.divergence import k3_mean
from pear_data.stages.measure import measure
from pear_data.stages.sample_tokens import read_sample
from pear_data.stages.weight import weight
from pear_data.store import writable_store
from pear_data.store.views import connect


@pytest.fixture(params=["behavior", "initial", "initial and behavior"])
def spanned(request, samples):
    """The samples, some of their policies with spans; one row that a policy could not align."""
    random = np.random.default_rng(5)
    for sample in samples:
        for policy in request.param.split(" and "):
            length = len(sample.initial)
            ends = np.unique(np.append(random.integers(1, length + 1, length // 2), length))
            setattr(sample, f"{policy}_spans", np.diff(ends, prepend=0))
    samples[4].behavior_status = "unaligned"
    samples[8].label = -1
    return samples


def spread(sample):
    """Log-ratios and span lengths: over the tokens between two ends that all spans share, the mean difference."""
    difference = sample.initial.astype(float) - sample.behavior.astype(float)
    spans = [mine for mine in (sample.initial_spans, sample.behavior_spans) if mine is not None]
    shared = set.intersection(*({int(end) for end in np.cumsum(mine)} for mine in spans))
    ends = [0, *sorted(shared)]
    means = [difference[a:b].mean() for a, b in itertools.pairwise(ends)]
    return np.repeat(means, np.diff(ends)), np.diff(ends)


def run(folder, **settings):
    with writable_store(folder) as store:
        weight(store, WeightSettings(**settings), Silent())
    return open_store(folder)


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_weights_are_those_of_spread_log_ratios(make_store, spanned, level):
    options = {"level": level, "gamma": 0.99, "block_size": 3}
    store = run(make_store(spanned), negative_scale=2.0, **options)
    rows = store.weights[level].to_table().to_pylist()
    summaries = store.sql("select log_ratio_sum, clipped_low, clipped_high from weights").to_pylist()
    for row, summary, sample in zip(rows, summaries, spanned, strict=True):
        if sample.behavior_status != "ok":
            assert (row["status"], row["weights"]) == ("unscored", None)
            continue
        log_ratio, lengths = spread(sample)
        if sample.label < 0:
            options = {**options, "level": "sequence"}
        want = importance_weights(
            log_ratio, 0 * log_ratio, [len(log_ratio)], span_lengths=lengths, **{**options, "level": level}
        )
        if sample.label < 0:
            want = -2 * importance_weights(log_ratio, 0 * log_ratio, [len(log_ratio)], level="sequence")
        np.testing.assert_allclose(row["weights"], want, rtol=1e-6)
        exact = (sample.initial.astype(float) - sample.behavior).sum()
        assert summary["log_ratio_sum"] == pytest.approx(exact, abs=1e-12)
        assert summary["clipped_low"] == (log_ratio < -0.08).sum()
        assert summary["clipped_high"] == (log_ratio > 0.3).sum()


@pytest.mark.parametrize(
    ("level", "words"),
    [("token", "an even share"), ("block", "ends with the span"), ("sequence", "of the whole text")],
)
def test_the_manifest_says_what_is_approximate(make_store, spanned, level, words):
    folder = make_store(spanned)
    said = run(folder, level=level).stage(f"weights/{level}").decisions["aligned_by_bytes"]
    named = [name for name in ("initial", "behavior") if getattr(spanned[0], f"{name}_spans") is not None]
    assert said.startswith(", ".join(named) + " reads the text with another tokenizer")
    assert words in said


def test_weights_on_shared_ids_say_nothing_of_it(make_store, samples):
    assert run(make_store(samples)).stage("weights/block").decisions == {}


def test_log_ratios_are_spread_wherever_they_are_shown(make_store, spanned):
    store = run(make_store(spanned))
    settings = WeightSettings()
    with connect(store) as views:
        for sample in spanned:
            shown = views.rows(
                "select log_ratio from tokens where sample_id = ? order by t", [sample.sample_id]
            )
            alone = read_sample(views, sample.sample_id, settings)
            if sample.behavior_status != "ok":
                assert {value for (value,) in shown} == {None}
                assert alone.log_ratios is None
                continue
            log_ratio, _ = spread(sample)
            np.testing.assert_allclose([value for (value,) in shown], log_ratio, atol=1e-12)
            np.testing.assert_allclose(alone.log_ratios, log_ratio, atol=1e-12)
    totals = measure(store, "block").whole()
    flat = np.concatenate([spread(s)[0] for s in spanned if s.label > 0 and s.behavior_status == "ok"])
    assert totals.tokens == len(flat)
    assert totals.ratio_low == (flat < -0.08).sum()
    assert k3_mean(totals) == pytest.approx((np.exp(flat) - 1 - flat).mean(), rel=1e-3)
