"""Log-ratio clips under which sums over a sample stay small, worked out from the histogram of log-ratios.

Balanced clips go with log-ratios that are centered by sample. They are about REACH / sqrt(T) wide for samples of T
tokens and set so that clipped log-ratios and discount sum to 0 on average: a suffix sum is then a walk without drift
that ends about REACH from where it began, whatever the length and however far apart the policies are. Damped clips are
REACH / T wide and need no centering, but leave little to tell tokens apart.
"""

from __future__ import annotations

import math

import numpy as np

from pear_data.config import Bounds, WeightSettings
from pear_data.stages.histogram import Floats, Integers
from pear_data.stages.measure import Totals

# Widest clip worth proposing: the method's own lower one.
WIDEST_CLIP = 0.08
# What the sum of the clipped log-ratios of a sample of mean length may come to: some samples are ten times as long.
REACH = 0.5
# The same where log-weights are clipped closer to 0: so small a part of the room they have.
PART_OF_ROOM = 1 / 8
_BISECTIONS = 50


def balanced_clips(totals: Totals, settings: WeightSettings) -> tuple[Bounds, float]:
    """Clips of centered log-ratios and the discount that goes with them: 1 where no clips make up for the present one.

    One clip is as far from 0 as sums over a sample may bear, the other as near to it as it takes.
    """
    drift = 0.0 if settings.level == "sequence" else math.log(settings.gamma)
    center = float(totals.target_logprob - totals.behavior_logprob) / totals.tokens
    reach = _reach(settings)
    widest = min(WIDEST_CLIP, reach / max(math.sqrt(length(totals)), _excursion(totals, center)))
    clips = _clips_of_mean(totals, center, -drift, widest)
    missed = abs(mean_clipped(totals, clips, center) + drift) * length(totals)
    return (clips, settings.gamma) if missed <= reach else (_clips_of_mean(totals, center, 0.0, widest), 1.0)


def _excursion(totals: Totals, center: float) -> float:
    """How many clips a suffix sum goes from 0 and back because samples' beginnings differ from their ends.

    Clips being small, what counts of a tenth is how many of its log-ratios lie above the center: as many as of a normal
    distribution with their mean and deviation.
    """
    known = totals.decile_tokens > 0
    tokens = totals.decile_tokens[known]
    mean = (totals.decile_target[known] - totals.decile_behavior[known]) / tokens
    deviation = np.sqrt(np.maximum(totals.decile_ratio_square[known] / tokens - mean**2, 1e-12))
    above = np.array([math.erf(z) for z in (mean - center) / deviation / math.sqrt(2)])
    # With clips that balance, a whole sample comes back to 0.
    step = (above - np.average(above, weights=tokens)) * tokens / totals.samples
    return float(np.abs(np.cumsum(step)).max())


def _reach(settings: WeightSettings) -> float:
    room = min((abs(bound) for bound in settings.clip_log_weight if bound), default=math.inf)
    return min(REACH, PART_OF_ROOM * room)


def _clips_of_mean(totals: Totals, center: float, mean: float, widest: float) -> Bounds:
    """Clips no wider than `widest` under which centered log-ratios have this mean, or come as near to it as can be."""
    values, counts = totals.log_ratios.means - center, totals.log_ratios.counts
    too_high = _mean_clipped(values, counts, (-widest, widest)) > mean
    nearest, farthest = 0.0, widest
    for _ in range(_BISECTIONS):
        middle = (nearest + farthest) / 2
        clips = (-widest, middle) if too_high else (-middle, widest)
        # Whichever side is drawn in, the mean comes towards the one asked for, and goes past it where it is too much.
        is_wide = (_mean_clipped(values, counts, clips) > mean) == too_high
        nearest, farthest = (nearest, middle) if is_wide else (middle, farthest)
    return (-widest, nearest) if too_high else (-nearest, widest)


def damped_clips(totals: Totals, settings: WeightSettings) -> tuple[Bounds, float]:
    """Clips under which a sample of mean length sums to no more than REACH, and the discount: 1 where the present one
    alone sums to more."""
    reach = _reach(settings)
    widest = min(WIDEST_CLIP, reach / length(totals))
    discounts = settings.level != "sequence" and -math.log(settings.gamma) * length(totals) > reach
    return (-widest, widest), 1.0 if discounts else settings.gamma


def length(totals: Totals) -> float:
    """Mean scored tokens of a sample."""
    return totals.tokens / totals.samples


def mean_clipped(totals: Totals, clips: Bounds, center: float = 0.0) -> float:
    """Mean of the log-ratios less `center`, clipped."""
    histogram = totals.log_ratios
    return _mean_clipped(histogram.means - center, histogram.counts, clips)


def _mean_clipped(values: Floats, counts: Integers, clips: Bounds) -> float:
    return float(counts @ np.clip(values, *clips)) / int(counts.sum())
