"""Counts of float32 values in the bins of `pear_data.binning`: quantiles and tails of any number of tokens.

What is read off is a bin's middle, within RELATIVE_ERROR of the values in it; the least and the greatest value are
kept exactly where they are known, and no middle lies beyond them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pear_data.binning import BINS, RELATIVE_ERROR, bins_of, middles_of

__all__ = ["RELATIVE_ERROR", "Histogram"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.signedinteger[Any]]


class Histogram:
    """A growing sample of float32 values; memory is bounded by the number of bins in use, not of values."""

    def __init__(self) -> None:
        self._bins: Integers = np.empty(0, dtype=np.int64)
        self.counts: Integers = np.empty(0, dtype=np.int64)
        self._minimum = np.inf
        self._maximum = -np.inf

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count values [N], all finite."""
        if not len(values):
            return
        counts = np.bincount(bins_of(values), minlength=BINS)
        used = np.flatnonzero(counts)
        self.merge(used, counts[used], float(values.min()), float(values.max()))

    def update(self, other: Histogram) -> None:
        """Count everything `other` has counted."""
        self.merge(other._bins, other.counts, other._minimum, other._maximum)

    def merge(
        self, bins: Integers, counts: Integers, minimum: float = np.inf, maximum: float = -np.inf
    ) -> None:
        """Count what was counted elsewhere: `bins` [n], ascending, and `counts` [n].

        Args:
            bins: bins of `pear_data.binning`.
            counts: values in each, at least 1.
            minimum: least of the values; without it and without `maximum` the middles stand for both.
            maximum: greatest of them.
        """
        if not len(bins):
            return
        if len(self._bins):
            bins, counts = _merged(self._bins, self.counts, bins, counts)
        self._bins, self.counts = bins.astype(np.int64, copy=False), counts.astype(np.int64, copy=False)
        self._minimum, self._maximum = min(self._minimum, minimum), max(self._maximum, maximum)

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def minimum(self) -> float:
        """Least value, within RELATIVE_ERROR where it was never told; inf where there are no values."""
        return self._minimum if self._is_bounded or not len(self._bins) else float(self.means[0])

    @property
    def maximum(self) -> float:
        """Greatest value, as `minimum`; -inf where there are no values."""
        return self._maximum if self._is_bounded or not len(self._bins) else float(self.means[-1])

    @property
    def means(self) -> Floats:
        """Middle of each used bin, ascending, beside `counts`; none lies beyond the least and the greatest value."""
        middles = middles_of(self._bins)
        return np.clip(middles, self._minimum, self._maximum) if self._is_bounded else middles

    @property
    def _is_bounded(self) -> bool:
        return self._minimum <= self._maximum

    def quantiles(self, shares: npt.ArrayLike) -> Floats:
        """For each share q the smallest value that at least q of the values do not exceed, within RELATIVE_ERROR."""
        ranks = np.asarray(shares, dtype=np.float64) * self.total
        index = np.searchsorted(np.cumsum(self.counts), ranks, side="left")
        found: Floats = self.means[np.minimum(index, len(self.counts) - 1)]
        return found

    def top_share(self, share: float) -> float:
        """Part of the sum that the largest `share` of the values hold, within 2 RELATIVE_ERROR of it.

        The values must not be negative; 0 where all are 0.
        """
        return top_share(self.means, self.counts, share)


def top_share(values: Floats, counts: Integers, share: float) -> float:
    """The same of `values` [n], ascending, each met as often as `counts` [n] says."""
    values, counts = values[::-1], counts[::-1]
    before = np.cumsum(counts) - counts
    taken = np.clip(share * counts.sum() - before, 0, counts)
    whole = float((counts * values).sum())
    return float((taken * values).sum()) / whole if whole else 0.0


def _merged(bins: Integers, counts: Integers, others: Integers, added: Integers) -> tuple[Integers, Integers]:
    """The union of two ascending lists of bins and the sums of their counts."""
    # The bins of real values lie close together, so that counting in place beats sorting.
    first = min(int(bins[0]), int(others[0]))
    dense = np.zeros(max(int(bins[-1]), int(others[-1])) + 1 - first, dtype=np.int64)
    dense[bins - first] = counts
    dense[others - first] += added
    used = np.flatnonzero(dense)
    return used + first, dense[used]
