"""The compiled loop behind `span_ratios` (numba); importing it takes a third of a second."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


def _spread(target: Any, behavior: Any, span_lengths: Any, ratios: Any) -> None:
    """Fill `ratios` [N] float64 with each token's even share of its span's log-ratio.

    `target` and `behavior` are log-probs [N] float32, `span_lengths` [m] sum to N.
    """
    start = 0
    for length in span_lengths:
        end = start + length
        total = 0.0
        for token in range(start, end):
            total += np.float64(target[token]) - np.float64(behavior[token])
        ratios[start:end] = total / length
        start = end


try:
    spread = numba.njit(_spread, nogil=True, cache=True)
except RuntimeError:  # nowhere to keep it: neither this folder nor the user's cache can be written
    spread = numba.njit(_spread, nogil=True)
