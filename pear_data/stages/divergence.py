"""Divergences of two policies from what totals keep of their log-ratios d: a histogram and the sums of d and d^2."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pear_data.stages.measure import Totals

# Log-ratios are bounded at this inside exp, so that a wild one shows as a huge number and not as infinity.
EXP_BOUND = 300.0
# Beyond it the greatest log-ratio decides every sum, and that one is known exactly.
_CORRECTED_UP_TO = 50.0

Floats = npt.NDArray[np.float64]


def k3_mean(totals: Totals) -> float:
    """mean(exp(d) - 1 - d)."""
    return _mean(totals, lambda d: np.expm1(_bounded(d)) - d, lambda d: np.expm1(_bounded(d)))


def chi2_mean(totals: Totals) -> float:
    """mean(exp(2 d)) - 1."""
    return _mean(totals, lambda d: np.expm1(2 * _bounded(d)), lambda d: 2 * np.exp(2 * _bounded(d)))


def bounded_exp(exponent: float) -> float:
    """exp(exponent), finite."""
    return float(np.exp(np.clip(exponent, -EXP_BOUND, EXP_BOUND)))


def _bounded(d: Floats) -> Floats:
    return np.minimum(d, EXP_BOUND)


def _mean(totals: Totals, function: Callable[[Floats], Floats], slope: Callable[[Floats], Floats]) -> float:
    """Mean of a function of d.

    Bins' middles are off by up to RELATIVE_ERROR of d. What that does to the sums of d and d^2 is known, since these
    were summed exactly, so the function's sum is corrected by as much of both errors as explains its slope best (two
    control variates).
    """
    d, counts = _values(totals)
    value = float(counts @ function(d))
    if np.abs(d).max() <= _CORRECTED_UP_TO:
        powers, slopes = np.stack((d, d**2)), np.stack((np.ones_like(d), 2 * d))
        exact = np.array([totals.target_logprob - totals.behavior_logprob, totals.ratio_square])
        # A bin's error is in proportion to its d and to the root of its count.
        scale = np.sqrt(counts) * np.abs(d)
        shares = np.linalg.lstsq((slopes * scale).T, slope(d) * scale, rcond=None)[0]
        value += float(shares @ (exact - powers @ counts))
    return value / totals.tokens


def _values(totals: Totals) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Values and how often each is met: the bins' middles, and the least and the greatest value as they are."""
    histogram = totals.log_ratios
    counts = histogram.counts.copy()
    ends = [histogram.minimum, histogram.maximum][: histogram.total]
    for place in (0, -1)[: len(ends)]:
        counts[place] -= 1
    return np.concatenate((histogram.means, ends)), np.concatenate((counts, np.ones(len(ends), np.int64)))
