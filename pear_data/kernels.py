"""The compiled passes behind every weight (numba): `scan` makes log-weights of log-probs, `tally` sums up weights.

Both take a chunk of n whole samples of N tokens, back to back: `ends` [n] are where they end. A sample's log-weights
are those of its units: its tokens, its blocks or itself, as its level has it. Sums are float64. All is single-threaded
and lets go of Python's lock, so that reading and writing go on beside it.
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
# Sums of a sample besides.
LOG_RATIO_SUM, LOG_RATIO_MIN, LOG_RATIO_MAX, WEIGHT_MIN, WEIGHT_MAX = range(5, 10)

Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(function: Function) -> Function:
    # Sums may be reassociated, which lets them run in vectors; NaN and infinity keep their meaning.
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc", "contract", "nsz"},
    }
    try:
        return cast("Function", numba.njit(cache=True, **options)(function))
    except RuntimeError:  # nowhere to keep it: neither this folder nor the user's cache can be written
        return cast("Function", numba.njit(**options)(function))


@_compiled
def scan(
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
    log_ratio: Any,
    log_weight: Any,
    counts: Any,
    sums: Any,
    sample_counts: Any,
    sample_sums: Any,
    histogram: Any,
) -> int:
    """Clipped log-weights of the units of a chunk; returns how many there are.

    Args:
        target: log-probs [N]; so `behavior`.
        ends: [n] int64.
        groups: [n] row of `counts`, `sums` and `histogram` that a sample counts to; -1 for none.
        levels: [n] TOKEN, BLOCK, SEQUENCE, UNIFORM or DFT.
        block_size: tokens per block, unless `block_ends` [K] int64 are given.
        center: [n] float64 subtracted from log-ratios; with `center_samples` each sample's mean instead.
        log_gamma: [n] float64.
        ratio_bounds: [n, 2] float64 clips of a log-ratio.
        weight_bounds: [n, 2] float64 clips of a log-weight.
        log_ratio: [N] float64, filled with the unclipped and uncentered log-ratios.
        log_weight: [N] float64, its beginning filled with the result.
        counts, sums: [groups, 5, 10] int64 and float64, added to.
        sample_counts, sample_sums: [n, 5] int64 and [n, 10] float64, filled but for what `tally` knows.
        histogram: [groups, BINS] int32 of log-ratios, added to.
    """
    unit = block = start = 0
    for i in range(len(ends)):
        end = ends[i]
        group = groups[i]
        shift = center[i]
        if center_samples:
            shift = _mean_log_ratio(target, behavior, start, end)
        low, high = ratio_bounds[i, 0], ratio_bounds[i, 1]
        _log_ratios(
            target,
            behavior,
            start,
            end,
            shift,
            low,
            high,
            log_ratio,
            group,
            counts,
            sums,
            sample_counts[i],
            sample_sums[i],
        )
        if group >= 0:
            for t in range(start, end):
                histogram[group, _bin(np.float32(log_ratio[t]))] += 1

        bounds = weight_bounds[i]
        discount = log_gamma[i] - shift
        blocks = _blocks(block_ends, block, end)
        if levels[i] == TOKEN:
            _token_level(log_ratio, start, end, low + shift, high + shift, discount, bounds, log_weight, unit)
            unit += end - start
        elif levels[i] == BLOCK:
            unit += _block_level(
                log_ratio,
                start,
                end,
                low + shift,
                high + shift,
                discount,
                bounds,
                log_weight,
                unit,
                block_size,
                block_ends[block : block + blocks],
            )
        elif levels[i] == SEQUENCE:
            total = _clipped_sum(log_ratio, start, end, low + shift, high + shift) - shift * (end - start)
            log_weight[unit] = _clip(total, bounds[0], bounds[1])
            unit += 1
        elif levels[i] == DFT:
            for t in range(start, end):
                log_weight[unit + t - start] = target[t]
            unit += end - start
        else:
            log_weight[unit] = 0.0
            unit += 1
        block += blocks
        start = end
    return unit


@_compiled
def tally(
    unit_weight: Any,
    ends: Any,
    groups: Any,
    levels: Any,
    block_size: int,
    block_ends: Any,
    bounds: Any,
    scale: Any,
    scale_samples: bool,
    weights: Any,
    counts: Any,
    sums: Any,
    sample_counts: Any,
    sample_sums: Any,
    histogram: Any,
) -> None:
    """Weights of a chunk's tokens from those of its units, and their sums.

    Args:
        unit_weight: exp of what `scan` filled, [units] float64.
        bounds: [n, 2] float64 weights at the log-weight clips.
        scale: [n] float64 factor of each sample's weights; with `scale_samples` each is first given a mean of 1.
        weights: [N] float32, filled.
        histogram: [groups, BINS] int32 of weights, added to.
        ends, groups, levels, block_size, block_ends, counts, sums, sample_counts, sample_sums: as for `scan`.
    """
    unit = block = start = 0
    for i in range(len(ends)):
        end = ends[i]
        blocks = _blocks(block_ends, block, end)
        own_ends = block_ends[block : block + blocks]
        units = _units(levels[i], end - start, block_size, blocks)
        own = unit_weight[unit : unit + units]
        factor = scale[i]
        if scale_samples:
            factor /= _mean_weight(own, start, end, levels[i], block_size, own_ends)
        group = groups[i]
        if units == end - start:
            for t in range(units):
                weights[start + t] = np.float32(own[t] * factor)
            if group >= 0:
                for t in range(start, end):
                    histogram[group, _bin(weights[t])] += 1
        else:
            first = start
            for k in range(units):
                last = _unit_end(k, start, end, levels[i], block_size, own_ends)
                weight = np.float32(own[k] * factor)
                for t in range(first, last):
                    weights[t] = weight
                if group >= 0:
                    histogram[group, _bin(weight)] += last - first
                first = last
        _weight_sums(
            weights,
            start,
            end,
            bounds[i, 0] * factor,
            bounds[i, 1] * factor,
            group,
            counts,
            sums,
            sample_counts[i],
            sample_sums[i],
        )
        unit += units
        block += blocks
        start = end


@_compiled
def _mean_log_ratio(target: Any, behavior: Any, start: int, end: int) -> float:
    total = 0.0
    for t in range(start, end):
        total += np.float64(target[t]) - np.float64(behavior[t])
    return total / (end - start)


@_compiled
def _log_ratios(
    target: Any,
    behavior: Any,
    start: int,
    end: int,
    shift: float,
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
    sample_counts[:] = 0
    sample_sums[:] = 0.0
    least, greatest = np.inf, -np.inf
    first = start
    for tenth in range(10):
        last = start + ((end - start) * (tenth + 1) + 9) // 10
        target_sum = behavior_sum = square = 0.0
        below = above = 0
        for t in range(first, last):
            x, y = np.float64(target[t]), np.float64(behavior[t])
            d = x - y
            log_ratio[t] = d
            target_sum += x
            behavior_sum += y
            square += d * d
            below += 1 if d - shift < low else 0
            above += 1 if d - shift > high else 0
            least = min(least, d)
            greatest = max(greatest, d)
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
    sample_sums[LOG_RATIO_MIN] = least
    sample_sums[LOG_RATIO_MAX] = greatest


@_compiled
def _token_level(
    log_ratio: Any,
    start: int,
    end: int,
    low: float,
    high: float,
    discount: float,
    bounds: Any,
    log_weight: Any,
    unit: int,
) -> None:
    """log G_t = (T-t) log gamma + sum of d_j behind t (3.4), from a sample's end to its start."""
    bound_low, bound_high = bounds[0], bounds[1]
    suffix = 0.0
    at = unit - start
    t = end - 1
    # Four at a time, so that only every fourth addition waits for the one before.
    while t - 3 >= start:
        d3 = _clip(log_ratio[t], low, high) + discount
        d2 = _clip(log_ratio[t - 1], low, high) + discount
        d1 = _clip(log_ratio[t - 2], low, high) + discount
        d0 = _clip(log_ratio[t - 3], low, high) + discount
        log_weight[at + t] = _clip(suffix, bound_low, bound_high)
        log_weight[at + t - 1] = _clip(suffix + d3, bound_low, bound_high)
        log_weight[at + t - 2] = _clip(suffix + (d3 + d2), bound_low, bound_high)
        log_weight[at + t - 3] = _clip(suffix + (d3 + d2 + d1), bound_low, bound_high)
        suffix += (d3 + d2) + (d1 + d0)
        t -= 4
    while t >= start:
        log_weight[at + t] = _clip(suffix, bound_low, bound_high)
        suffix += _clip(log_ratio[t], low, high) + discount
        t -= 1


@_compiled
def _block_level(
    log_ratio: Any,
    start: int,
    end: int,
    low: float,
    high: float,
    discount: float,
    bounds: Any,
    log_weight: Any,
    unit: int,
    block_size: int,
    block_ends: Any,
) -> int:
    """The same from each block's end (3.5); returns the number of blocks."""
    blocks = _units(BLOCK, end - start, block_size, len(block_ends))
    suffix = 0.0
    last = end
    for k in range(blocks - 1, -1, -1):
        log_weight[unit + k] = _clip(suffix, bounds[0], bounds[1])
        first = _unit_end(k - 1, start, end, BLOCK, block_size, block_ends) if k else start
        suffix += _clipped_sum(log_ratio, first, last, low, high) + discount * (last - first)
        last = first
    return blocks


@_compiled
def _weight_sums(
    weights: Any,
    start: int,
    end: int,
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
    least, greatest = np.float32(np.inf), np.float32(-np.inf)
    first = start
    for tenth in range(10):
        last = start + ((end - start) * (tenth + 1) + 9) // 10
        total = square = 0.0
        at_least = at_greatest = 0
        for t in range(first, last):
            weight = weights[t]
            total += np.float64(weight)
            square += np.float64(weight) * np.float64(weight)
            at_least += 1 if weight <= low else 0
            at_greatest += 1 if weight >= high else 0
            least = min(least, weight)
            greatest = max(greatest, weight)
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
    sample_sums[WEIGHT_MIN] = least
    sample_sums[WEIGHT_MAX] = greatest


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
def _bin(value: Any) -> Any:
    """Bin of a float32, as `pear_data.binning.bins_of` has it."""
    bits = np.float32(value).view(np.uint32)
    sortable = ~bits if bits & SIGN else bits | SIGN
    return (sortable + HALF) >> SHIFT
