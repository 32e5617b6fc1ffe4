"""Spearman's rank correlation: Pearson's over ranks, where equal values share the mean of the ranks they take up.

Ranks of samples are exact. Tokens do not fit into memory: those whose weights share a bin (`pear_data.binning`; weights
0.8 % apart at most) are ranked as equals. Over many tokens, where no bin holds a large part of them, the correlation is
within 0.001 of the exact one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def shared_ranks(counts: Counts) -> Floats:
    """The rank of the values of each bin [B], from -1/2 to 1/2 with a mean of 0, given how many each holds."""
    total = int(counts.sum())
    below = np.cumsum(counts) - counts
    ranks: Floats = (2 * below + counts - total) / (2 * max(total, 1))
    return ranks


def ranks_of(values: npt.NDArray[np.float32]) -> Floats:
    """The rank of each value [n], as `shared_ranks` has them."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = shared_ranks(counts)[group]
    return ranks


class Correlation:
    """Pearson's correlation of every two of k columns whose mean is 0, from parts of any number of rows."""

    def __init__(self, columns: int) -> None:
        self._products = np.zeros((columns, columns))

    def add(self, rows: Sequence[Floats]) -> None:
        """Take in a part: k columns of the same length."""
        stacked = np.stack(rows)
        self._products += stacked @ stacked.T

    def of(self, first: int, second: int) -> float | None:
        """Between -1 and 1; None where a column has only one value."""
        squares = float(self._products[first, first] * self._products[second, second])
        if not squares:
            return None
        return float(np.clip(self._products[first, second] / np.sqrt(squares), -1, 1))
