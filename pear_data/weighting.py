"""PEAR's importance weights, vectorised over flat log-probs (arXiv 2602.01058, sections 3.2 to 3.7).

Sums are float64 wherever they are cumulative and run over cache-sized chunks of whole samples, so precision does
not depend on how many samples share an array; weights are stored in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Level = Literal["token", "block", "sequence"]
Bounds = tuple[float, float]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CLIP_LOG_RATIO: Bounds = (-0.08, 0.3)
CLIP_LOG_WEIGHT: Bounds = (-10.0, 5.0)
CHUNK_TOKENS = 1 << 16


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

    Returns:
        float32 [N], positive. The last token's weight (token level) and the last block's (block level) are 1.

    Raises:
        ValueError: shapes that do not fit together, a log-prob that is not finite, or an option out of range.
    """
    target_N, behavior_N, lengths_n = _checked(target, behavior, lengths)
    check_options(level, block_size, gamma, clip_log_ratio, clip_log_weight)
    span_ends_m = None if span_lengths is None else _checked_span_ends(span_lengths, lengths_n)
    weights_N = np.empty(len(target_N), dtype=np.float32)
    for start, end, lengths_c in _chunks_of_whole_samples(lengths_n):
        span_ends = None if span_ends_m is None else _within(span_ends_m, start, end)
        log_ratio = _log_ratios(target_N[start:end], behavior_N[start:end], span_ends)
        np.clip(log_ratio, *clip_log_ratio, out=log_ratio)
        blocks = _blocks(lengths_c, block_size, span_ends) if level == "block" else None
        log_weight, repeats = _log_weights(log_ratio, lengths_c, level, blocks, math.log(gamma))
        np.clip(log_weight, *clip_log_weight, out=log_weight)
        weight = np.exp(log_weight, out=log_weight).astype(np.float32)
        weights_N[start:end] = weight if repeats is None else np.repeat(weight, repeats)
    return weights_N


def log_ratios(
    target: npt.NDArray[np.floating],
    behavior: npt.NDArray[np.floating],
    span_lengths: npt.NDArray[np.integer] | None = None,
) -> FloatArray:
    """Unclipped log-ratio (3.2) of each token, float64 [N]: with `span_lengths`, its span's, evenly spread.

    `target` and `behavior` are log-probs [N]; `span_lengths` [m] sum to N.
    """
    span_ends = None if span_lengths is None else np.cumsum(span_lengths, dtype=np.int64)
    return _log_ratios(target, behavior, span_ends)


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


def _chunks_of_whole_samples(lengths_n: IntArray) -> Iterator[tuple[int, int, IntArray]]:
    """(start, end, lengths) of runs of samples of about CHUNK_TOKENS tokens; empty samples are left out."""
    lengths_n = lengths_n[lengths_n > 0]
    ends = np.cumsum(lengths_n)
    first = start = 0
    while first < len(lengths_n):
        last = max(first + 1, int(np.searchsorted(ends, start + CHUNK_TOKENS, side="right")))
        end = int(ends[last - 1])
        yield start, end, lengths_n[first:last]
        first, start = last, end


def _checked_span_ends(span_lengths: npt.ArrayLike, lengths_n: IntArray) -> IntArray:
    lengths_m = np.asarray(span_lengths)
    if lengths_m.ndim != 1 or (lengths_m.size and not np.issubdtype(lengths_m.dtype, np.integer)):
        raise ValueError(f"span_lengths are {lengths_m.dtype} {lengths_m.shape}, not a flat list of integers")
    span_ends = np.cumsum(lengths_m, dtype=np.int64)
    sample_ends = np.cumsum(lengths_n[lengths_n > 0])
    inside = np.isin(sample_ends, span_ends)
    if (lengths_m < 1).any() or lengths_m.sum() != lengths_n.sum() or not inside.all():
        raise ValueError(
            f"span_lengths ({len(lengths_m)} that sum to {lengths_m.sum()}) must each be at least 1 and sum to every "
            f"sample's length ({len(lengths_n)} samples of {lengths_n.sum()} tokens)"
        )
    return span_ends


def _within(span_ends: IntArray, start: int, end: int) -> IntArray:
    """The spans of the tokens from `start` to `end`, as ends counted from `start`."""
    first, last = np.searchsorted(span_ends, (start, end), side="right")
    return span_ends[first:last] - start


def _log_ratios(
    target: npt.NDArray[np.floating], behavior: npt.NDArray[np.floating], span_ends: IntArray | None
) -> FloatArray:
    log_ratio: FloatArray = np.subtract(target, behavior, dtype=np.float64)
    if span_ends is None or not len(span_ends):
        return log_ratio
    lengths = np.diff(span_ends, prepend=0)
    return np.repeat(np.add.reduceat(log_ratio, span_ends - lengths) / lengths, lengths)


def _blocks(lengths: IntArray, block_size: int, span_ends: IntArray | None) -> tuple[IntArray, IntArray]:
    """(ends [k], blocks per sample [n]): where each block of a chunk ends, and how many each sample has."""
    blocks = -(-lengths // block_size)
    ends = np.cumsum(lengths)
    block_in_sample = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    sample_start, sample_end = np.repeat(ends - lengths, blocks), np.repeat(ends, blocks)
    block_end = np.minimum(sample_start + (block_in_sample + 1) * block_size, sample_end)
    return (block_end, blocks) if span_ends is None else _on_span_ends(block_end, blocks, span_ends)


def _on_span_ends(block_end: IntArray, blocks: IntArray, span_ends: IntArray) -> tuple[IntArray, IntArray]:
    """Blocks whose ends are moved on to the end of the span they fall in; those that then end together are one."""
    moved = span_ends[np.searchsorted(span_ends, block_end)]
    last = np.append(moved[1:] != moved[:-1], True)
    return moved[last], np.add.reduceat(last, np.cumsum(blocks) - blocks, dtype=np.int64)


def _log_weights(
    log_ratio: FloatArray,
    lengths: IntArray,
    level: Level,
    blocks: tuple[IntArray, IntArray] | None,
    log_gamma: float,
) -> tuple[FloatArray, IntArray | None]:
    """log G of a chunk: one value per token (repeats None), or one per block or sample and how often it repeats.

    `blocks` are of any lengths; each ends inside or with its sample.
    """
    ends = np.cumsum(lengths)
    if level == "sequence":
        return np.add.reduceat(log_ratio, ends - lengths), lengths
    discounted = np.cumsum(log_ratio + log_gamma)
    if blocks is None:
        return np.repeat(discounted[ends - 1], lengths) - discounted, None
    block_end, per_sample = blocks
    log_weight = discounted[np.repeat(ends, per_sample) - 1] - discounted[block_end - 1]
    return log_weight, np.diff(block_end, prepend=0)
