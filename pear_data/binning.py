"""Bins for float32 values of any size: those whose sign, exponent and mantissa round to the same first 16 bits.

Bins ascend with their values. The middle of a bin is within RELATIVE_ERROR of every value in it; those of 0 and of the
powers of 2, 1 among them, are exact.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BINS = 1 << 16
RELATIVE_ERROR = 2.0**-8
HALF = np.uint32(1 << 15)
SHIFT = np.uint32(16)
SIGN = np.uint32(1 << 31)


def bins_of(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Bin of each value [N], all finite: 0 to BINS - 1."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((np.where(bits & SIGN, ~bits, bits | SIGN) + HALF) >> SHIFT).astype(np.int32)


def middles_of(bins: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """The middle of each bin [n]."""
    sortable = bins.astype(np.uint32) << SHIFT
    bits = np.where(sortable & SIGN, sortable ^ SIGN, ~sortable).astype(np.uint32)
    return bits.view(np.float32).astype(np.float64)
