"""The weighting kernels against golden vectors and a float64 transcription of the paper's formulas."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_data import importance_weights
from pear_data.weighting import common_spans

GOLDEN = json.loads((Path(__file__).parents[1] / "reference" / "golden_weights.json").read_text())
OPTIONS = ("block_size", "gamma", "clip_log_ratio", "clip_log_weight")


def paper_weights(
    target,
    behavior,
    level,
    block_size=4,
    gamma=0.999,
    clip_log_ratio=(-0.08, 0.3),
    clip_log_weight=(-10.0, 5.0),
    spans=None,
):
    """Equations 3.3 to 3.5 and 3.7, read off the page, one sample at a time.

    With `spans` (their lengths) each token has the mean log-ratio of its span, and blocks end where spans do.
    """
    log_ratio = [p - q for p, q in zip(target, behavior, strict=True)]
    total = len(log_ratio)
    span_ends = list(itertools.accumulate(spans)) if spans else list(range(1, total + 1))
    for start, end in itertools.pairwise([0, *span_ends]):
        log_ratio[start:end] = [math.fsum(log_ratio[start:end]) / (end - start)] * (end - start)
    log_ratio = [min(max(ratio, clip_log_ratio[0]), clip_log_ratio[1]) for ratio in log_ratio]
    weights = []
    for t in range(1, total + 1):
        if level == "sequence":
            log_weight = math.fsum(log_ratio)
        else:
            end = t if level == "token" else block_end(t, block_size, total, span_ends)
            log_weight = (total - end) * math.log(gamma) + math.fsum(log_ratio[end:])
        weights.append(math.exp(min(max(log_weight, clip_log_weight[0]), clip_log_weight[1])))
    return np.array(weights)


def block_end(t, block_size, total, span_ends):
    """The first k * block_size, moved on to the end of its span, that is not before token t."""
    wanted = (min(multiple, total) for multiple in itertools.count(block_size, block_size))
    moved = (next(end for end in span_ends if end >= multiple) for multiple in wanted)
    return next(end for end in moved if end >= t)


def relative_error(got, want):
    return float(np.max(np.abs(np.asarray(got, dtype=np.float64) / want - 1), initial=0.0))


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_golden_vectors(level):
    worst = 0.0
    for case in GOLDEN:
        options = {name: case[name] for name in OPTIONS if name in case}
        want = np.array(case["weights"][level])
        got = importance_weights(case["target"], case["behavior"], [len(want)], level=level, **options)
        assert got.dtype == np.float32
        assert got.shape == want.shape
        worst = max(worst, relative_error(got, want))
    assert worst <= 1e-6
    print(f"golden vectors, {level}: {len(GOLDEN)} cases, max relative error {worst:.1e}")


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_golden_vectors_back_to_back(level):
    cases = [case for case in GOLDEN if not any(name in case for name in OPTIONS)]
    assert len(cases) > 3
    flat = {side: np.concatenate([np.array(case[side]) for case in cases]) for side in ("target", "behavior")}
    lengths = [len(case["target"]) for case in cases]
    got = importance_weights(flat["target"], flat["behavior"], lengths, level=level)
    want = np.concatenate([np.array(case["weights"][level]) for case in cases])
    assert relative_error(got, want) <= 1e-6


def random_spans(random, length):
    """Lengths of spans that sum to `length`."""
    if not length:
        return []
    ends = np.unique(np.append(random.integers(1, length + 1, length // 2), length))
    return np.diff(ends, prepend=0).tolist()


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=8),
    level=st.sampled_from(["token", "block", "sequence"]),
    block_size=st.integers(1, 9),
    gamma=st.floats(0.5, 1.0),
    seed=st.integers(0, 2**32 - 1),
    spanned=st.booleans(),
)
def test_many_samples_equal_the_paper_one_by_one(lengths, level, block_size, gamma, seed, spanned):
    random = np.random.default_rng(seed)
    target, behavior = -random.exponential(size=(2, sum(lengths)))
    options = {
        "block_size": block_size,
        "gamma": gamma,
        "clip_log_ratio": (-0.5, 0.4),
        "clip_log_weight": (-3, 2),
    }
    spans = [random_spans(random, length) if spanned else None for length in lengths]
    flat = np.concatenate([[], *spans]).astype(int) if spanned else None
    got = importance_weights(target, behavior, lengths, level=level, span_lengths=flat, **options)
    ends = list(itertools.accumulate(lengths))
    want = [
        paper_weights(target[end - length : end], behavior[end - length : end], level, spans=mine, **options)
        for end, length, mine in zip(ends, lengths, spans, strict=True)
    ]
    assert relative_error(got, np.concatenate([*want, []])) <= 1e-6


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8), seed=st.integers(0, 2**32 - 1))
def test_blocks_of_any_lengths_are_weighted_from_their_ends(lengths, seed):
    random = np.random.default_rng(seed)
    target, behavior = -random.exponential(size=(2, sum(lengths)))
    blocks = [random_spans(random, length) for length in lengths]
    flat = np.concatenate([[], *blocks]).astype(int)
    got = importance_weights(target, behavior, lengths, gamma=0.9, block_lengths=flat)
    want = []
    for end, length, mine in zip(itertools.accumulate(lengths), lengths, blocks, strict=True):
        d = np.clip((target - behavior)[end - length : end], -0.08, 0.3)
        for block_end, size in zip(itertools.accumulate(mine), mine, strict=True):
            log_weight = (length - block_end) * np.log(0.9) + d[block_end:].sum()
            want += [np.exp(np.clip(log_weight, -10, 5))] * size
    assert relative_error(got, np.array(want)) <= 1e-6


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_spans_of_one_token_change_nothing(level):
    random = np.random.default_rng(1)
    target, behavior = -random.exponential(size=(2, 50)).astype(np.float32)
    plain = importance_weights(target, behavior, [20, 30], level=level)
    ones = importance_weights(target, behavior, [20, 30], level=level, span_lengths=np.ones(50, dtype=int))
    assert (plain == ones).all()


def test_common_spans_end_where_both_do():
    assert common_spans(np.array([2, 2, 1, 3, 2]), np.array([1, 3, 4, 2])).tolist() == [4, 4, 2]


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_a_long_sample_far_into_a_large_array_keeps_its_precision(level):
    random = np.random.default_rng(0)
    lengths = [*random.integers(1, 4000, size=600), 131_072]
    target, behavior = -random.exponential(size=(2, sum(lengths))).astype(np.float32)
    options = {"gamma": 1.0, "clip_log_weight": (-600.0, 600.0), "clip_log_ratio": (-0.02, 0.02)}
    got = importance_weights(target, behavior, lengths, level=level, **options)[-131_072:]
    log_ratio = np.clip(target.astype(np.float64) - behavior, -0.02, 0.02)[-131_072:]
    suffix = np.cumsum(log_ratio[::-1].astype(np.longdouble))[::-1]
    ends = {"token": 1, "block": 4, "sequence": 131_072}[level]
    end = np.minimum((np.arange(131_072) // ends + 1) * ends, 131_072)
    log_weight = suffix[0] if level == "sequence" else np.append(suffix, 0)[end]
    want = np.broadcast_to(np.exp(log_weight.astype(np.float64)), got.shape)
    inside = (want > 1e-37) & (want < 1e37)
    assert inside.sum() > 1000
    assert relative_error(got[inside], want[inside]) <= 1e-6


def test_the_last_token_and_the_last_block_weigh_one():
    target, behavior = [-1.0] * 10, [-0.1] * 10
    assert importance_weights(target, behavior, [10], level="token")[-1] == 1
    assert (importance_weights(target, behavior, [10], level="block")[-2:] == 1).all()
    assert (
        importance_weights(target, behavior, [10], level="block", block_size=1)
        == importance_weights(target, behavior, [10], level="token")
    ).all()


def test_no_samples():
    assert importance_weights([], [], []).shape == (0,)
    assert importance_weights([], [], [0, 0], level="sequence").shape == (0,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": [3]}, "lengths sum to 3, but there are 2"),
        ({"lengths": [-1, 3]}, "lengths sum"),
        ({"lengths": [2.0]}, "not integers"),
        ({"behavior": [-1.0]}, "of one shape"),
        ({"target": [[-1.0, -1.0]]}, "flat"),
        ({"target": [-1.0, math.nan]}, "target log-probs are not all finite"),
        ({"behavior": [-math.inf, -1.0]}, "behavior log-probs are not all finite"),
        ({"level": "word"}, "level is 'word'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"gamma": 1.1}, "gamma is 1.1"),
        ({"clip_log_ratio": (1, 0)}, "clip_log_ratio is"),
        ({"clip_log_weight": (1, 0)}, "clip_log_weight is"),
        ({"clip_log_ratio": (math.nan, 0)}, "clip_log_ratio is"),
        ({"span_lengths": [1]}, "span_lengths .1 that sum to 1. must"),
        ({"span_lengths": [0, 2]}, "at least 1"),
        ({"span_lengths": [1.0, 1.0]}, "not a flat list of integers"),
        ({"lengths": [1, 1], "span_lengths": [2]}, "every sample's length"),
    ],
)
def test_bad_input_is_named(changed, message):
    arguments = {"target": [-1.0, -2.0], "behavior": [-1.0, -1.0], "lengths": [2], **changed}
    with pytest.raises(ValueError, match=message):
        importance_weights(**arguments)
