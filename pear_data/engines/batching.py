"""Which samples go through a model together, and where their scored tokens are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pear_data.tokens import IntArray, TokenBatch


def check_lengths(batch: TokenBatch, max_length: int) -> None:
    """Raise ValueError naming the first sample of more than `max_length` tokens."""
    for row in np.flatnonzero(batch.num_tokens > max_length)[:1]:
        raise ValueError(
            f"sample {batch.sample_ids[row]} has {batch.num_tokens[row]} tokens, more than the {max_length} "
            "the engine scores"
        )


def check_vocabulary(batch: TokenBatch, vocab_size: int) -> None:
    """Raise ValueError naming the first sample with an id outside [0, vocab_size)."""
    for position in np.flatnonzero((batch.input_ids < 0) | (batch.input_ids >= vocab_size))[:1]:
        row = int(np.searchsorted(batch.offsets, position, side="right")) - 1
        raise ValueError(
            f"sample {batch.sample_ids[row]} holds token id {batch.input_ids[position]}, outside the model's "
            f"vocabulary of {vocab_size}"
        )


def needed_tokens(batch: TokenBatch) -> IntArray:
    """Tokens of each sample to run, [n]: those before its last scored token; 0 if none is scored.

    The whole sample where that saves less than a tenth: equal shapes round as plain transformers does, and over 2,000
    tokens float32 rounding alone was seen to reach 3e-5.
    """
    scored = np.flatnonzero(batch.loss_mask)
    ends = batch.scored_offsets[1:]
    has_scored = batch.num_scored > 0
    needed = np.zeros(len(batch), dtype=np.int64)
    needed[has_scored] = scored[ends[has_scored] - 1] - batch.offsets[:-1][has_scored]
    return np.where(needed > 0.9 * batch.num_tokens, batch.num_tokens, needed)


def token_budget_batches(lengths: IntArray, budget: int) -> Iterator[IntArray]:
    """Rows with a length, longest first, in groups whose padded size (rows x longest) stays within `budget`.

    A row longer than the budget makes a group of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    start = 0
    while start < len(order):
        count = max(1, budget // int(lengths[order[start]]))
        yield order[start : start + count]
        start += count


def spans(starts: IntArray, lengths: IntArray) -> IntArray:
    """The indices start, start + 1, ... of each span, one after the other, [sum(lengths)]."""
    before = np.concatenate(([0], np.cumsum(lengths)))
    return np.repeat(starts - before[:-1], lengths) + np.arange(before[-1])
