"""A scale of nine colours for weights: blue below 1, orange above, nothing at 1. Readable without red or green."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Furthest step from 1 on either side.
STEPS = 4
# A step multiplies or divides by this; the least one whose scale holds the weights is taken.
FACTORS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class WeightScale:
    """Weights in steps of a factor: step k holds the weights nearest to factor**k, the end steps all beyond."""

    factor: float

    def steps(self, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Step of each weight, -STEPS to STEPS. A weight of 0 or less is in the lowest."""
        least = np.finfo(np.float32).tiny
        steps = np.rint(np.log(np.maximum(weights, least, dtype=np.float64)) / np.log(self.factor))
        bounded: npt.NDArray[np.int64] = np.clip(steps, -STEPS, STEPS).astype(np.int64)
        return bounded

    def label(self, step: int) -> str:
        """What a step means, in a few characters."""
        if step == 0:
            return "1"
        value = self.factor**step
        shown = f"{value:.2g}" if value < 1 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        return f"≤ {shown}" if step == -STEPS else f"≥ {shown}" if step == STEPS else shown


def scale_for(low: float, high: float) -> WeightScale:
    """The finest scale on which weights from `low` to `high` (both positive) do not all fall into the end steps."""
    reach = max(abs(np.log(low)), abs(np.log(high)))
    fitting = [factor for factor in FACTORS if (STEPS + 0.5) * np.log(factor) >= reach]
    return WeightScale(fitting[0] if fitting else FACTORS[-1])
