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

# Parts that may wait to be added up: it costs about as much for one as for many.
WAITING = 32

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.signedinteger[Any]]


class Histogram:
    """A growing sample of float32 values; memory is bounded by the number of bins in use, not of values."""

    def __init__(self) -> None:
        # Bins, ascending, and counts: of everything, or of several parts that wait to be added up together.
        self._parts: list[tuple[Integers, Integers]] = []
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
        self.merge(*other._added_up(), other._minimum, other._maximum)

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
        self._parts.append((bins, counts))
        if len(self._parts) > WAITING:
            self._added_up()
        self._minimum, self._maximum = min(self._minimum, minimum), max(self._maximum, maximum)

    @property
    def counts(self) -> Integers:
        """Values in each used bin, by ascending bin."""
        return self._added_up()[1]

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def minimum(self) -> float:
        """Least value, within RELATIVE_ERROR where it was never told; inf where there are no values."""
        return self._minimum if self._is_bounded or not self._parts else float(self.means[0])

    @property
    def maximum(self) -> float:
        """Greatest value, as `minimum`; -inf where there are no values."""
        return self._maximum if self._is_bounded or not self._parts else float(self.means[-1])

    @property
    def means(self) -> Floats:
        """Middle of each used bin, ascending, beside `counts`; none lies beyond the least and the greatest value."""
        middles = middles_of(self._added_up()[0])
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

    def _added_up(self) -> tuple[Integers, Integers]:
        if not self._parts:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        if len(self._parts) > 1:
            self._parts = [_sum(self._parts)]
        return self._parts[0]


def top_share(values: Floats, counts: Integers, share: float) -> float:
    """The same of `values` [n], ascending, each met as often as `counts` [n] says."""
    values, counts = values[::-1], counts[::-1]
    before = np.cumsum(counts) - counts
    taken = np.clip(share * counts.sum() - before, 0, counts)
    whole = float((counts * values).sum())
    return float((taken * values).sum()) / whole if whole else 0.0


def _sum(parts: list[tuple[Integers, Integers]]) -> tuple[Integers, Integers]:
    """The union of several ascending lists of bins and the sums of their counts."""
    first = min(int(bins[0]) for bins, _ in parts)
    last = max(int(bins[-1]) for bins, _ in parts)
    # The bins of real values lie close together, so that counting in place beats sorting.
    dense = np.zeros(last + 1 - first, dtype=np.int64)
    for bins, counts in parts:
        dense[bins - first] += counts
    used = np.flatnonzero(dense)
    return used + first, dense[used]
