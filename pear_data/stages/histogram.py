"""Counts of float32 values in bins of a fixed relative width: quantiles and tails of any number of tokens in one pass.

A bin holds the values that share their sign, exponent and first MANTISSA_BITS bits of mantissa, so it is at most
2^-MANTISSA_BITS (0.2 %) wide relative to its values. Each bin keeps its count and its sum; what is read off is a bin's
mean, which is exact where many values are one (those at a clip) and within half a bin otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.signedinteger[Any]]

MANTISSA_BITS = 9
RELATIVE_ERROR = 2.0**-MANTISSA_BITS
_SHIFT = 23 - MANTISSA_BITS
_BINS = 1 << (32 - _SHIFT)


class Histogram:
    """A growing sample of float32 values; memory is bounded by the number of bins in use, not of values."""

    def __init__(self) -> None:
        self._bins: Integers = np.empty(0, dtype=np.int64)
        self.counts: Integers = np.empty(0, dtype=np.int64)
        self._sums: Floats = np.empty(0, dtype=np.float64)
        self.minimum = np.inf
        self.maximum = -np.inf

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count values [N], all finite."""
        if not len(values):
            return
        bins = _bins_of(values)
        counts = np.bincount(bins, minlength=_BINS)
        sums = np.bincount(bins, weights=values, minlength=_BINS).astype(np.float64, copy=False)
        used = np.flatnonzero(counts)
        self._merge(used, counts[used], sums[used])
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))

    def update(self, other: Histogram) -> None:
        """Count everything `other` has counted."""
        self._merge(other._bins, other.counts, other._sums)
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def means(self) -> Floats:
        """Mean of each used bin, ascending, beside `counts`."""
        means: Floats = np.divide(self._sums, self.counts)
        return means

    def quantiles(self, shares: npt.ArrayLike) -> Floats:
        """For each share q the smallest value that at least q of the values do not exceed, within RELATIVE_ERROR."""
        ranks = np.asarray(shares, dtype=np.float64) * self.total
        index = np.searchsorted(np.cumsum(self.counts), ranks, side="left")
        found = self.means[np.minimum(index, len(self.counts) - 1)]
        bounded: Floats = np.clip(found, self.minimum, self.maximum)
        return bounded

    def top_share(self, share: float) -> float:
        """Part of the sum that the largest `share` of the values hold; the values must be positive."""
        left = share * self.total
        counts, means = self.counts[::-1], self.means[::-1]
        before = np.cumsum(counts) - counts
        taken = np.clip(left - before, 0, counts)
        return float((taken * means).sum() / self._sums.sum())

    def _merge(self, bins: Integers, counts: Integers, sums: Floats) -> None:
        self._bins, place = np.unique(np.concatenate((self._bins, bins)), return_inverse=True)
        merged = np.zeros(len(self._bins), dtype=np.int64)
        np.add.at(merged, place, np.concatenate((self.counts, counts)))
        self.counts = merged
        merged_sums = np.zeros(len(self._bins))
        np.add.at(merged_sums, place, np.concatenate((self._sums, sums)))
        self._sums = merged_sums


def _bins_of(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Bin of each value, ascending with the value: the sortable form of its leading bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    sign = np.uint32(0x80000000)
    return np.where(bits & sign, ~bits, bits | sign) >> np.uint32(_SHIFT)
