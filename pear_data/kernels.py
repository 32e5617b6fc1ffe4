"""The compiled pass behind every weight (numba): from log-probs to weights, their sums and histograms in one go.

Sums are float64. All is single-threaded and lets go of Python's lock, so that reading and writing go on beside it. It
is one module, because what was compiled is kept until this very file changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

from pear_data.binning import HALF, SHIFT, SIGN

TOKEN, BLOCK, SEQUENCE, UNIFORM, DFT = range(5)

# Counts and sums by tenth of a sample, and of a sample.
TOKENS, CLIPPED_LOW, CLIPPED_HIGH, SATURATED_LOW, SATURATED_HIGH = range(5)
WEIGHT, WEIGHT_SQUARE, TARGET, BEHAVIOR, LOG_RATIO_SQUARE = range(5)
OF_RATIOS = slice(TARGET, LOG_RATIO_SQUARE + 1)  # of the sums by tenth
COUNTS_OF_RATIOS = slice(TOKENS, CLIPPED_HIGH + 1)
# Sums and extremes of a sample besides.
LOG_RATIO_SUM, LOG_RATIO_MIN, LOG_RATIO_MAX, WEIGHT_MIN, WEIGHT_MAX = range(5, 10)
OF_SAMPLES_RATIOS = slice(TARGET, LOG_RATIO_MAX + 1)

ABOVE_BITS = 32
ABOVE = 1 << ABOVE_BITS

Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(function: Function) -> Function:
    # Sums may be reassociated, which lets them run in vectors; NaN and infinity keep their meaning.
    fastmath = {"reassoc", "contract", "nsz"}
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return cast("Function", numba.njit(cache=True, **options)(function))
    except RuntimeError:  # nowhere to keep it: neither this folder nor the user's cache can be written
        return cast("Function", numba.njit(**options)(function))


@_compiled
def weigh_samples(
    target: Any,
    behavior: Any,
    ends: Any,
    groups: Any,
    levels: Any,
    block_size: int,
    block_ends: Any,
    center: Any,
    center_samples: bool,
    log_gamma: Any,
    ratio_bounds: Any,
    weight_bounds: Any,
    scale: Any,
    scale_samples: bool,
    weights: Any,
    counts: Any,
    sums: Any,
    ratio_histogram: Any,
    weight_histogram: Any,
    sample_counts: Any,
    sample_sums: Any,
    scratch: Any,
    bins: Any,
    measures_ratios: bool,
) -> None:
    """Weights of n whole samples of N tokens, back to back, with their sums.

    A sample is read once and stays in the cache until it is done. It has a log-weight per unit: per token, per block or
    one, as its level has it.

    Args:
        target: log-probs [N]; so `behavior`.
        ends: [n] int64, where samples end.
        groups: [n] row of `counts`, `sums` and the histograms that a sample counts to; -1 for none.
        levels: [n] TOKEN, BLOCK, SEQUENCE, UNIFORM or DFT.
        block_size: tokens per block, unless `block_ends` [K] int64 are given.
        center: [n] float64 subtracted from log-ratios; with `center_samples` each sample's mean instead.
        log_gamma: [n] float64.
        ratio_bounds: [n, 2] float64 clips of a log-ratio.
        weight_bounds: [n, 2] float64 clips of a log-weight.
        scale: [n] float64 factor of the weights; with `scale_samples` each sample's are first given a mean of 1.
        weights: [N] float32, filled.
        counts, sums: [groups, 5, 10] int64 and float64, added to.
        ratio_histogram, weight_histogram: [groups, 2, BINS] int32, each in two halves, added to; or [0, 2, BINS].
        sample_counts, sample_sums: [n, 5] int64 and [n, 10] float64, filled.
        scratch: [2, M] float64 for the longest sample's M tokens; so `bins` [M] uint16.
        measures_ratios: whether counts, sums and histograms of log-ratios are wanted; else theirs are 0.
    """
    log_ratio, log_weight = scratch[0], scratch[1]
    block = start = 0
    for i in range(len(ends)):
        end = ends[i]
        length = end - start
        own_target, own_behavior, own_weights = target[start:end], behavior[start:end], weights[start:end]
        level, group, bounds = levels[i], groups[i], weight_bounds[i]
        shift = _mean_log_ratio(own_target, own_behavior) if center_samples else center[i]
        low, high = ratio_bounds[i, 0] + shift, ratio_bounds[i, 1] + shift
        own_counts, own_sums = sample_counts[i], sample_sums[i]
        own_counts[:] = 0
        own_sums[:] = 0.0
        if measures_ratios:
            _log_ratios(
                own_target, own_behavior, low, high, log_ratio, group, counts, sums, own_counts, own_sums
            )
            least, greatest = _count(log_ratio[:length], bins, group, ratio_histogram)
            own_sums[LOG_RATIO_MIN], own_sums[LOG_RATIO_MAX] = least, greatest
        else:
            for t in range(length):
                log_ratio[t] = np.float64(own_target[t]) - np.float64(own_behavior[t])

        blocks = _blocks(block_ends, block, end)
        own_ends = block_ends[block : block + blocks]
        units = _units(level, length, block_size, blocks)
        discount = log_gamma[i] - shift
        if level == TOKEN:
            _token_level(log_ratio, length, low, high, discount, bounds, log_weight)
        elif level == BLOCK:
            span = (start, end, block_size, own_ends)
            _block_level(log_ratio, span, low, high, discount, bounds, log_weight[:units])
        elif level == SEQUENCE:
            total = _clipped_sum(log_ratio, 0, length, low, high) - shift * length
            log_weight[0] = _clip(total, bounds[0], bounds[1])
        elif level == DFT:
            log_weight[:length] = own_target
        else:
            log_weight[0] = 0.0

        for k in range(units):
            log_weight[k] = _exp(log_weight[k])
        factor = scale[i]
        if scale_samples:
            factor /= _mean_weight(log_weight[:units], start, end, level, block_size, own_ends)
        _expand(log_weight[:units], factor, start, end, level, block_size, own_ends, own_weights)
        if units == length:
            least, greatest = _count(own_weights, bins, group, weight_histogram)
        else:
            least, greatest = _count_units(
                log_weight[:units], factor, start, end, level, block_size, own_ends, group, weight_histogram
            )
        own_sums[WEIGHT_MIN], own_sums[WEIGHT_MAX] = least, greatest
        at_low, at_high = _exp(bounds[0]) * factor, _exp(bounds[1]) * factor
        _weight_sums(own_weights, at_low, at_high, group, counts, sums, own_counts, own_sums)
        block += blocks
        start = end


@_compiled
def drain(histograms: Any) -> Any:
    """Rows, bins and counts of what histograms [groups, 2, BINS] have counted, by row and bin; they are emptied."""
    used = 0
    for group in range(histograms.shape[0]):
        for place in range(histograms.shape[2]):
            used += 1 if histograms[group, 0, place] + histograms[group, 1, place] else 0
    groups, places = np.empty(used, np.int64), np.empty(used, np.int64)
    counts = np.empty(used, np.int64)
    at = 0
    for group in range(histograms.shape[0]):
        for place in range(histograms.shape[2]):
            count = histograms[group, 0, place] + histograms[group, 1, place]
            if count:
                groups[at], places[at], counts[at] = group, place, count
                histograms[group, 0, place] = histograms[group, 1, place] = 0
                at += 1
    return groups, places, counts


@_compiled
def _mean_log_ratio(target: Any, behavior: Any) -> float:
    total = 0.0
    for t in range(len(target)):
        total += np.float64(target[t]) - np.float64(behavior[t])
    return total / len(target)


@_compiled
def _log_ratios(
    target: Any,
    behavior: Any,
    low: float,
    high: float,
    log_ratio: Any,
    group: int,
    counts: Any,
    sums: Any,
    sample_counts: Any,
    sample_sums: Any,
) -> None:
    """A sample's log-ratios with their counts and sums."""
    first = 0
    for tenth in range(10):
        last = (len(target) * (tenth + 1) + 9) // 10
        target_sum = behavior_sum = square = 0.0
        outside = 0  # two counts in one, for each costs time at the end of a tenth
        for t in range(first, last):
            x, y = np.float64(target[t]), np.float64(behavior[t])
            d = x - y
            log_ratio[t] = d
            target_sum += x
            behavior_sum += y
            square += d * d
            outside += (1 if d < low else 0) + (ABOVE if d > high else 0)
        below, above = outside & (ABOVE - 1), outside >> ABOVE_BITS
        sample_counts[TOKENS] += last - first
        sample_counts[CLIPPED_LOW] += below
        sample_counts[CLIPPED_HIGH] += above
        sample_sums[TARGET] += target_sum
        sample_sums[BEHAVIOR] += behavior_sum
        sample_sums[LOG_RATIO_SQUARE] += square
        if group >= 0:
            counts[group, TOKENS, tenth] += last - first
            counts[group, CLIPPED_LOW, tenth] += below
            counts[group, CLIPPED_HIGH, tenth] += above
            sums[group, TARGET, tenth] += target_sum
            sums[group, BEHAVIOR, tenth] += behavior_sum
            sums[group, LOG_RATIO_SQUARE, tenth] += square
        first = last
    sample_sums[LOG_RATIO_SUM] = sample_sums[TARGET] - sample_sums[BEHAVIOR]


@_compiled
def _token_level(
    log_ratio: Any, length: int, low: float, high: float, discount: float, bounds: Any, log_weight: Any
) -> None:
    """log G_t = (T-t) log gamma + sum of d_j behind t (3.4), from a sample's end to its start."""
    bound_low, bound_high = bounds[0], bounds[1]
    suffix = 0.0
    t = length - 1
    # Four at a time, so that only every fourth addition waits for the one before.
    while t >= 3:
        d3 = _clip(log_ratio[t], low, high) + discount
        d2 = _clip(log_ratio[t - 1], low, high) + discount
        d1 = _clip(log_ratio[t - 2], low, high) + discount
        d0 = _clip(log_ratio[t - 3], low, high) + discount
        log_weight[t] = _clip(suffix, bound_low, bound_high)
        log_weight[t - 1] = _clip(suffix + d3, bound_low, bound_high)
        log_weight[t - 2] = _clip(suffix + (d3 + d2), bound_low, bound_high)
        log_weight[t - 3] = _clip(suffix + (d3 + d2 + d1), bound_low, bound_high)
        suffix += (d3 + d2) + (d1 + d0)
        t -= 4
    while t >= 0:
        log_weight[t] = _clip(suffix, bound_low, bound_high)
        suffix += _clip(log_ratio[t], low, high) + discount
        t -= 1


@_compiled
def _block_level(
    log_ratio: Any, span: Any, low: float, high: float, discount: float, bounds: Any, log_weight: Any
) -> None:
    """The same from each block's end (3.5); `span` is where the sample lies, its block size and its blocks' ends."""
    start, end, block_size, block_ends = span
    suffix = 0.0
    last = end
    for k in range(len(log_weight) - 1, -1, -1):
        log_weight[k] = _clip(suffix, bounds[0], bounds[1])
        first = _unit_end(k - 1, start, end, BLOCK, block_size, block_ends) if k else start
        suffix += _clipped_sum(log_ratio, first - start, last - start, low, high) + discount * (last - first)
        last = first


@_compiled
def _expand(
    unit_weight: Any,
    factor: float,
    start: int,
    end: int,
    level: int,
    block_size: int,
    block_ends: Any,
    weights: Any,
) -> None:
    """Weights of a sample's tokens from those of its units."""
    if len(unit_weight) == len(weights):
        for t in range(len(weights)):
            weights[t] = np.float32(unit_weight[t] * factor)
        return
    first = start
    for k in range(len(unit_weight)):
        last = _unit_end(k, start, end, level, block_size, block_ends)
        weight = np.float32(unit_weight[k] * factor)
        for t in range(first - start, last - start):
            weights[t] = weight
        first = last


@_compiled
def _weight_sums(
    weights: Any,
    at_low: float,
    at_high: float,
    group: int,
    counts: Any,
    sums: Any,
    sample_counts: Any,
    sample_sums: Any,
) -> None:
    """Sums of a sample's weights; those at a bound are saturated. A negative factor turns the bounds round."""
    low, high = np.float32(at_low), np.float32(at_high)
    if low > high:
        low, high = high, low
    first = 0
    for tenth in range(10):
        last = (len(weights) * (tenth + 1) + 9) // 10
        total = square = 0.0
        saturated = 0
        for t in range(first, last):
            weight = weights[t]
            total += np.float64(weight)
            square += np.float64(weight) * np.float64(weight)
            saturated += (1 if weight <= low else 0) + (ABOVE if weight >= high else 0)
        at_least, at_greatest = saturated & (ABOVE - 1), saturated >> ABOVE_BITS
        sample_counts[SATURATED_LOW] += at_least
        sample_counts[SATURATED_HIGH] += at_greatest
        sample_sums[WEIGHT] += total
        sample_sums[WEIGHT_SQUARE] += square
        if group >= 0:
            counts[group, SATURATED_LOW, tenth] += at_least
            counts[group, SATURATED_HIGH, tenth] += at_greatest
            sums[group, WEIGHT, tenth] += total
            sums[group, WEIGHT_SQUARE, tenth] += square
        first = last


@_compiled
def _count(values: Any, bins: Any, group: int, histogram: Any) -> Any:
    """Count values by bin; returns the least and the greatest, in float32."""
    least, greatest = np.uint32(0xFFFFFFFF), np.uint32(0)
    # Compared as integers, because comparisons of floats do not run in vectors.
    for t in range(len(values)):
        place = _sortable(values[t])
        least = place if place < least else least
        greatest = place if place > greatest else greatest
        bins[t] = np.uint16((place + HALF) >> SHIFT)
    if 0 <= group < len(histogram):
        # Neighbours are often alike, and adding to what was just written waits.
        for t in range(len(values) - 1, 0, -2):
            histogram[group, 0, bins[t]] += 1
            histogram[group, 1, bins[t - 1]] += 1
        if len(values) % 2:
            histogram[group, 0, bins[0]] += 1
    return _from_sortable(least), _from_sortable(greatest)


@_compiled
def _count_units(
    unit_weight: Any,
    factor: float,
    start: int,
    end: int,
    level: int,
    block_size: int,
    block_ends: Any,
    group: int,
    histogram: Any,
) -> Any:
    """The same of weights that stand for several tokens each."""
    least, greatest = np.uint32(0xFFFFFFFF), np.uint32(0)
    first = start
    for k in range(len(unit_weight)):
        last = _unit_end(k, start, end, level, block_size, block_ends)
        place = _sortable(unit_weight[k] * factor)
        least = place if place < least else least
        greatest = place if place > greatest else greatest
        if 0 <= group < len(histogram):
            histogram[group, k % 2, (place + HALF) >> SHIFT] += last - first
        first = last
    return _from_sortable(least), _from_sortable(greatest)


@_compiled
def _mean_weight(own: Any, start: int, end: int, level: int, block_size: int, block_ends: Any) -> float:
    total = 0.0
    first = start
    for k in range(len(own)):
        last = _unit_end(k, start, end, level, block_size, block_ends)
        total += own[k] * (last - first)
        first = last
    return total / (end - start)


@_compiled
def _clipped_sum(log_ratio: Any, first: int, last: int, low: float, high: float) -> float:
    total = 0.0
    for t in range(first, last):
        total += _clip(log_ratio[t], low, high)
    return total


@_compiled
def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


@_compiled
def _blocks(block_ends: Any, block: int, end: int) -> int:
    """How many of the blocks from `block` on end with or before `end`; none where blocks are of one size."""
    last = block
    while last < len(block_ends) and block_ends[last] <= end:
        last += 1
    return last - block


@_compiled
def _units(level: int, length: int, block_size: int, blocks: int) -> int:
    """Units of a sample with `length` tokens; `blocks` is 0 where they are of `block_size` tokens."""
    if level in (TOKEN, DFT):
        return length
    if level == BLOCK:
        return blocks if blocks else (length + block_size - 1) // block_size
    return 1


@_compiled
def _unit_end(k: int, start: int, end: int, level: int, block_size: int, block_ends: Any) -> int:
    if level in (TOKEN, DFT):
        return start + k + 1
    if level == BLOCK:
        return int(block_ends[k]) if len(block_ends) else min(start + (k + 1) * block_size, end)
    return end


@_compiled
def _sortable(value: Any) -> Any:
    """The bits of a float32, ascending with it, as `pear_data.binning.bins_of` has them."""
    bits = np.float32(value).view(np.uint32)
    return np.uint32(bits ^ (np.uint32(np.int32(bits) >> np.int32(31)) | SIGN))


@_compiled
def _from_sortable(place: Any) -> Any:
    bits = place ^ SIGN if place & SIGN else ~place
    return np.uint32(bits).view(np.float32)


@_compiled
def _exp(value: float) -> float:
    """exp to 1e-9 relative, which runs in vectors; float32 keeps 6e-8 of it."""
    value = _clip(value, -700.0, 700.0)
    power: float = np.floor(value * 1.4426950408889634 + 0.5)
    rest = (value - power * 0.693145751953125) - power * 1.42860682030941723212e-6
    result = 1.0 + rest * (
        1.0
        + rest
        * (
            0.5
            + rest
            * (
                1 / 6
                + rest
                * (1 / 24 + rest * (1 / 120 + rest * (1 / 720 + rest * (1 / 5040 + rest * (1 / 40320)))))
            )
        )
    )
    bits = np.int64((np.int64(np.int32(power)) + 1023) << 52)
    scale: float = bits.view(np.float64)
    return result * scale
