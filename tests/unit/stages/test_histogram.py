"""Quantiles and tails from bins against numpy's over the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from pear_data.binning import RELATIVE_ERROR, bins_of
from pear_data.stages.histogram import Histogram

SHARES = [0, 0.001, 0.3, 0.5, 0.97, 0.985, 0.9999, 1]


def values():
    random = np.random.default_rng(0)
    spread = np.concatenate([-random.exponential(2, 5000), [0.0, -0.0, 1e-30, 3e38], np.full(100, 0.25)])
    return spread.astype(np.float32)


def histogram_of(values):
    histogram = Histogram()
    histogram.add(values)
    return histogram


def test_a_histogram_in_parts_is_the_histogram_of_all():
    whole, parts, other = histogram_of(values()), Histogram(), histogram_of(values()[3000:])
    for part in np.array_split(values()[:3000], 7):
        parts.add(part)
    parts.update(other)
    parts.add(values()[:0])
    parts.update(Histogram())
    assert parts.total == whole.total == len(values())
    np.testing.assert_array_equal(parts.counts, whole.counts)
    np.testing.assert_array_equal(parts.means, whole.means)
    assert (
        (parts.minimum, parts.maximum) == (whole.minimum, whole.maximum) == (values().min(), values().max())
    )


def test_quantiles_lie_within_the_error_of_a_bin():
    expected = np.quantile(values(), SHARES, method="inverted_cdf")
    whole = histogram_of(values())
    np.testing.assert_allclose(whole.quantiles(SHARES), expected, rtol=RELATIVE_ERROR)
    # Powers of two are the middles of their bins; the ends are told.
    assert whole.quantiles([0.985])[0] == 0.25


def test_no_middle_lies_beyond_the_ends():
    one = np.full(9, 1.0039, dtype=np.float32)
    assert histogram_of(one).quantiles([0, 0.5, 1]).tolist() == [one[0]] * 3
    largest = np.array([np.finfo(np.float32).max], dtype=np.float32)
    assert histogram_of(largest).means.tolist() == [largest[0]]


def test_bins_without_ends_stand_for_them():
    bins, counts = np.unique(bins_of(values()), return_counts=True)
    told = Histogram()
    told.merge(bins, counts)
    assert told.minimum == pytest.approx(values().min(), rel=RELATIVE_ERROR)
    assert told.maximum == pytest.approx(values().max(), rel=RELATIVE_ERROR)
    assert told.total == len(values())
    assert (Histogram().minimum, Histogram().maximum, Histogram().total) == (np.inf, -np.inf, 0)


@pytest.mark.parametrize("share", [0.0003, 0.01, 0.5, 1])
def test_the_top_share_against_sorting(share):
    weights = np.random.default_rng(0).lognormal(0, 2, 3333).astype(np.float32)
    ordered = np.sort(weights.astype(np.float64))[::-1]
    left = share * len(weights)
    whole = int(left)
    expected = ordered[:whole].sum() + (left - whole) * (ordered[whole] if whole < len(weights) else 0)
    found = histogram_of(weights).top_share(share)
    assert found == pytest.approx(expected / ordered.sum(), rel=2 * RELATIVE_ERROR)
    assert histogram_of(np.zeros(5, np.float32)).top_share(share) == 0
