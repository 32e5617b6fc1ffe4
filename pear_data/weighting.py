"""PEAR's importance weights over flat log-probs (arXiv 2602.01058, sections 3.2 to 3.7).

Samples stand back to back. Sums are float64 wherever they are cumulative; weights are stored in float32. The compiled
loops are in `pear_data.kernels`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Level = Literal["token", "block", "sequence"]
Bounds = tuple[float, float]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CLIP_LOG_RATIO: Bounds = (-0.08, 0.3)
CLIP_LOG_WEIGHT: Bounds = (-10.0, 5.0)

# Levels of a sample, as the kernels number them.
LEVELS = ("token", "block", "sequence", "uniform", "dft")


@dataclass(slots=True)
class SampleOptions:
    """How each of n samples is weighted."""

    levels: npt.NDArray[np.int8]  # [n], index into LEVELS
    block_size: int
    log_gamma: FloatArray  # [n]
    clip_log_ratio: FloatArray  # [n, 2]
    clip_log_weight: FloatArray  # [n, 2]
    center: FloatArray  # [n], subtracted from log-ratios before the clip
    center_samples: bool  # each sample's mean log-ratio is subtracted instead
    scale: FloatArray  # [n], factor of the weights
    scale_samples: bool  # each sample's weights are first given a mean of 1

    @classmethod
    def alike(
        cls,
        n: int,
        level: str,
        block_size: int,
        gamma: float,
        clip_log_ratio: Bounds,
        clip_log_weight: Bounds,
    ) -> SampleOptions:
        """The same for n samples, neither centered nor scaled."""
        return cls(
            levels=np.full(n, LEVELS.index(level), dtype=np.int8),
            block_size=block_size,
            log_gamma=np.full(n, math.log(gamma)),
            clip_log_ratio=np.tile(np.asarray(clip_log_ratio, dtype=np.float64), (n, 1)),
            clip_log_weight=np.tile(np.asarray(clip_log_weight, dtype=np.float64), (n, 1)),
            center=np.zeros(n),
            center_samples=False,
            scale=np.ones(n),
            scale_samples=False,
        )


@dataclass(slots=True)
class GroupSums:
    """Running sums of S groups of samples; the kernels tell what the rows of the middle axis are."""

    counts: npt.NDArray[np.int64]  # [S, 5, 10], by tenth of a sample
    sums: FloatArray  # [S, 5, 10]
    log_ratios: npt.NDArray[np.int32]  # [S, 2, BINS] tokens by bin of their log-ratio, in two halves
    weights: npt.NDArray[np.int32]  # [S, 2, BINS] tokens by bin of their weight, likewise

    @classmethod
    def zeros(cls, groups: int, *, histograms: bool = True) -> GroupSums:
        """Nothing yet; without `histograms` these have no rows and stay so."""
        from pear_data.binning import BINS

        return cls(
            np.zeros((groups, 5, 10), dtype=np.int64),
            np.zeros((groups, 5, 10)),
            np.zeros((groups if histograms else 0, 2, BINS), dtype=np.int32),
            np.zeros((groups if histograms else 0, 2, BINS), dtype=np.int32),
        )


@dataclass(frozen=True, slots=True)
class SampleSums:
    """Counts and sums of n samples; the kernels tell what the columns are."""

    counts: npt.NDArray[np.int64]  # [n, 5]
    sums: FloatArray  # [n, 10]

    @classmethod
    def empty(cls, n: int) -> SampleSums:
        """Room for n samples."""
        return cls(np.empty((n, 5), dtype=np.int64), np.empty((n, 10)))

    def between(self, first: int, last: int) -> SampleSums:
        """Those of the samples from `first` to `last`."""
        return SampleSums(self.counts[first:last], self.sums[first:last])


def importance_weights(
    target: npt.ArrayLike,
    behavior: npt.ArrayLike,
    lengths: npt.ArrayLike,
    *,
    level: Level = "block",
    block_size: int = 4,
    gamma: float = 0.999,
    clip_log_ratio: Bounds = CLIP_LOG_RATIO,
    clip_log_weight: Bounds = CLIP_LOG_WEIGHT,
    span_lengths: npt.ArrayLike | None = None,
    block_lengths: npt.ArrayLike | None = None,
) -> npt.NDArray[np.float32]:
    """Weights of the scored tokens of many samples, stored back to back.

    Where one of the policies reads the text with another tokenizer, its log-probs are known for whole spans of tokens
    only. With `span_lengths` a span's log-ratio is spread evenly over its tokens before the clip, and a block's end
    that falls inside a span is moved on to the end of that span. So block weights hold whole spans; a token-level
    weight takes the share of its own span that lies behind it, which is an even share and not known to be right.

    Args:
        target: log-probs (nats) of the scored tokens under the target policy, [N] float.
        behavior: the same under the behavior policy, [N] float.
        lengths: scored tokens of each sample, [n] integer, summing to N.
        level: "token" (3.4), "block" (3.5) or "sequence" (3.3).
        block_size: tokens per block; only the block level reads it.
        gamma: discount in (0, 1]; the sequence level has none.
        clip_log_ratio: bounds on each token's log-ratio, applied before summing (3.7).
        clip_log_weight: bounds on the log of a weight, applied once, after summing (3.7).
        span_lengths: tokens of each span, [m] integer, each at least 1; spans end where samples end.
        block_lengths: tokens of each block, [k] integer likewise, in place of `block_size`.

    Returns:
        float32 [N], positive. The last token's weight (token level) and the last block's (block level) are 1.

    Raises:
        ValueError: shapes that do not fit together, a log-prob that is not finite, or an option out of range.
    """
    target_N, behavior_N, lengths_n = _checked(target, behavior, lengths)
    check_options(level, block_size, gamma, clip_log_ratio, clip_log_weight)
    lengths_n = lengths_n[lengths_n > 0]
    spans = None if span_lengths is None else _checked_pieces("span_lengths", span_lengths, lengths_n)
    blocks = None if block_lengths is None else _checked_pieces("block_lengths", block_lengths, lengths_n)
    block_size = min(block_size, len(target_N) + 1)  # beyond that it says no more, and might overflow
    options = SampleOptions.alike(len(lengths_n), level, block_size, gamma, clip_log_ratio, clip_log_weight)
    weights_N = np.empty(len(target_N), dtype=np.float32)
    weigh(
        target_N,
        behavior_N,
        lengths_n,
        options,
        np.full(len(lengths_n), -1),
        GroupSums.zeros(0),
        weights_N,
        SampleSums.empty(len(lengths_n)),
        span_lengths=spans,
        block_lengths=blocks if level == "block" else None,
    )
    return weights_N


def weigh(
    target: npt.NDArray[np.floating],
    behavior: npt.NDArray[np.floating],
    lengths: IntArray,
    options: SampleOptions,
    groups: npt.NDArray[np.integer],
    totals: GroupSums,
    weights: npt.NDArray[np.float32],
    found: SampleSums,
    *,
    span_lengths: IntArray | None = None,
    block_lengths: IntArray | None = None,
    measures_ratios: bool = True,
) -> None:
    """Fill `weights` [N] of the tokens of n samples and what is `found` of each; add to `totals`.

    Args:
        target: log-probs [N], float32 or float64; so `behavior`. Where one is not finite, so are its sample's sums.
        lengths: scored tokens of each sample [n], each at least 1, summing to N.
        groups: [n] the group of `totals` a sample counts to, -1 for none.
        span_lengths: as in `importance_weights`.
        block_lengths: tokens of each block, instead of `options.block_size`; summing to N.
        measures_ratios: whether what is said of log-ratios is wanted; else it is 0, and no log-prob is checked.
    """
    from pear_data import kernels

    spread = None
    if span_lengths is not None:
        spread = np.cumsum(span_lengths, dtype=np.int64)
        target, behavior = _spread(target, span_lengths), _spread(behavior, span_lengths)
    block_ends = _block_ends(lengths, options.block_size, block_lengths, spread)
    longest = int(lengths.max(initial=0))
    kernels.weigh_samples(
        target,
        behavior,
        np.cumsum(lengths),
        groups.astype(np.int64, copy=False),
        options.levels,
        options.block_size,
        block_ends,
        options.center,
        options.center_samples,
        options.log_gamma,
        options.clip_log_ratio,
        options.clip_log_weight,
        options.scale,
        options.scale_samples,
        weights,
        totals.counts,
        totals.sums,
        totals.log_ratios,
        totals.weights,
        found.counts,
        found.sums,
        np.empty((2, longest)),
        np.empty(longest, dtype=np.uint16),
        measures_ratios,
    )


def log_ratios(
    target: npt.NDArray[np.floating],
    behavior: npt.NDArray[np.floating],
    span_lengths: npt.NDArray[np.integer] | None = None,
) -> FloatArray:
    """Unclipped log-ratio (3.2) of each token, float64 [N]: with `span_lengths`, its span's, evenly spread.

    `target` and `behavior` are log-probs [N]; `span_lengths` [m] sum to N.
    """
    log_ratio: FloatArray = np.subtract(target, behavior, dtype=np.float64)
    return log_ratio if span_lengths is None else _spread(log_ratio, np.asarray(span_lengths, dtype=np.int64))


def common_spans(first: npt.NDArray[np.integer], second: npt.NDArray[np.integer]) -> IntArray:
    """Lengths of the smallest spans that are made of whole spans of both; both sum to the same tokens."""
    ends, others = np.cumsum(first, dtype=np.int64), np.cumsum(second, dtype=np.int64)
    return np.diff(np.intersect1d(ends, others, assume_unique=True), prepend=0)


def check_options(
    level: str, block_size: int, gamma: float, clip_log_ratio: Bounds, clip_log_weight: Bounds
) -> None:
    """Raise ValueError, naming the option, unless every option is in its range."""
    if level not in get_args(Level):
        raise ValueError(f"level is {level!r}, not one of {', '.join(get_args(Level))}")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; a block has at least 1 token")
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma is {gamma}; the discount lies in (0, 1]")
    for name, (low, high) in (("clip_log_ratio", clip_log_ratio), ("clip_log_weight", clip_log_weight)):
        if not low <= high:
            raise ValueError(f"{name} is ({low}, {high}); the lower bound comes first")


def _checked(
    target: npt.ArrayLike, behavior: npt.ArrayLike, lengths: npt.ArrayLike
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating], IntArray]:
    target_N, behavior_N, lengths_n = np.asarray(target), np.asarray(behavior), np.asarray(lengths)
    if target_N.ndim != 1 or target_N.shape != behavior_N.shape or lengths_n.ndim != 1:
        raise ValueError(
            f"target {target_N.shape}, behavior {behavior_N.shape} and lengths {lengths_n.shape} "
            "must be flat, the first two of one shape"
        )
    if lengths_n.size and not np.issubdtype(lengths_n.dtype, np.integer):
        raise ValueError(f"lengths are {lengths_n.dtype}, not integers")
    if (lengths_n < 0).any() or lengths_n.sum() != len(target_N):
        raise ValueError(f"lengths sum to {lengths_n.sum()}, but there are {len(target_N)} log-probs")
    for name, logprobs in (("target", target_N), ("behavior", behavior_N)):
        # A one-sided -inf would be clipped to a finite log-ratio and go unnoticed, so inputs are checked.
        if not np.isfinite(logprobs).all():
            raise ValueError(
                f"{name} log-probs are not all finite: {np.count_nonzero(~np.isfinite(logprobs))}"
            )
    return target_N, behavior_N, lengths_n.astype(np.int64, copy=False)


def _checked_pieces(name: str, piece_lengths: npt.ArrayLike, lengths_n: IntArray) -> IntArray:
    lengths_m = np.asarray(piece_lengths)
    if lengths_m.ndim != 1 or (lengths_m.size and not np.issubdtype(lengths_m.dtype, np.integer)):
        raise ValueError(f"{name} are {lengths_m.dtype} {lengths_m.shape}, not a flat list of integers")
    ends = np.cumsum(lengths_m, dtype=np.int64)
    inside = np.isin(np.cumsum(lengths_n), ends)
    if (lengths_m < 1).any() or lengths_m.sum() != lengths_n.sum() or not inside.all():
        raise ValueError(
            f"{name} ({len(lengths_m)} that sum to {lengths_m.sum()}) must each be at least 1 and sum to every "
            f"sample's length ({len(lengths_n)} samples of {lengths_n.sum()} tokens)"
        )
    return lengths_m.astype(np.int64, copy=False)


def _spread(values: npt.NDArray[np.floating], span_lengths: IntArray) -> FloatArray:
    """Each span's sum, spread evenly over its tokens."""
    if not len(span_lengths):
        return values.astype(np.float64)
    starts = np.cumsum(span_lengths) - span_lengths
    means = np.add.reduceat(values, starts, dtype=np.float64) / span_lengths
    return np.repeat(means, span_lengths)


def _block_ends(
    lengths: IntArray, block_size: int, block_lengths: IntArray | None, span_ends: IntArray | None
) -> IntArray:
    """Where each block of the tokens ends; empty where blocks are of `block_size` tokens and no span moves them."""
    if block_lengths is not None:
        ends = np.cumsum(block_lengths)
    elif span_ends is not None:
        ends = _even_block_ends(lengths, block_size)
    else:
        return np.empty(0, dtype=np.int64)
    if span_ends is None or not len(ends):
        return ends
    # A block's end inside a span is moved on to the end of that span; blocks that then end together are one.
    moved: IntArray = np.unique(span_ends[np.searchsorted(span_ends, ends)])
    return moved


def _even_block_ends(lengths: IntArray, block_size: int) -> IntArray:
    blocks = -(-lengths // block_size)
    ends = np.cumsum(lengths)
    block_in_sample = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    sample_start, sample_end = np.repeat(ends - lengths, blocks), np.repeat(ends, blocks)
    block_ends: IntArray = np.minimum(sample_start + (block_in_sample + 1) * block_size, sample_end)
    return block_ends
