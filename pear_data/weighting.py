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
) -> npt.NDArray[np.float32]:
    """Weights of the scored tokens of many samples, stored back to back.

    Args:
        target: log-probs (nats) of the scored tokens under the target policy, [N] float.
        behavior: the same under the behavior policy, [N] float.
        lengths: scored tokens of each sample, [n] integer, summing to N.
        level: "token" (3.4), "block" (3.5) or "sequence" (3.3).
        block_size: tokens per block; only the block level reads it.
        gamma: discount in (0, 1]; the sequence level has none.
        clip_log_ratio: bounds on each token's log-ratio, applied before summing (3.7).
        clip_log_weight: bounds on the log of a weight, applied once, after summing (3.7).

    Returns:
        float32 [N], positive. The last token's weight (token level) and the last block's (block level) are 1.

    Raises:
        ValueError: shapes that do not fit together, a log-prob that is not finite, or an option out of range.
    """
    target_N, behavior_N, lengths_n = _checked(target, behavior, lengths)
    check_options(level, block_size, gamma, clip_log_ratio, clip_log_weight)
    weights_N = np.empty(len(target_N), dtype=np.float32)
    for start, end, lengths_c in _chunks_of_whole_samples(lengths_n):
        log_ratio = np.subtract(target_N[start:end], behavior_N[start:end], dtype=np.float64)
        np.clip(log_ratio, *clip_log_ratio, out=log_ratio)
        log_weight, repeats = _log_weights(log_ratio, lengths_c, level, block_size, math.log(gamma))
        np.clip(log_weight, *clip_log_weight, out=log_weight)
        weight = np.exp(log_weight, out=log_weight).astype(np.float32)
        weights_N[start:end] = weight if repeats is None else np.repeat(weight, repeats)
    return weights_N


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


def _log_weights(
    log_ratio: FloatArray, lengths: IntArray, level: Level, block_size: int, log_gamma: float
) -> tuple[FloatArray, IntArray | None]:
    """log G of a chunk: one value per token (repeats None), or one per block or sample and how often it repeats."""
    ends = np.cumsum(lengths)
    if level == "sequence":
        return np.add.reduceat(log_ratio, ends - lengths), lengths
    discounted = np.cumsum(log_ratio + log_gamma)
    if level == "token":
        return np.repeat(discounted[ends - 1], lengths) - discounted, None
    blocks = -(-lengths // block_size)
    block_in_sample = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    sample_start, sample_end = np.repeat(ends - lengths, blocks), np.repeat(ends, blocks)
    block_start = sample_start + block_in_sample * block_size
    block_end = np.minimum(block_start + block_size, sample_end)
    return discounted[sample_end - 1] - discounted[block_end - 1], block_end - block_start
