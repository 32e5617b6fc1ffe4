from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pear_data.engines.batching import (
    check_lengths,
    check_vocabulary,
    needed_tokens,
    spans,
    token_budget_batches,
)
from pear_data.tokens import TokenBatch

BatchOf = Callable[..., TokenBatch]


def test_needed_tokens_end_before_the_last_scored_one(batch_of: BatchOf) -> None:
    assert needed_tokens(batch_of("..xx", ".", ".x.x..", "...", ".x")).tolist() == [3, 0, 3, 0, 1]


def test_batches_are_sorted_hold_every_row_once_and_keep_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(0, 50, 200)
    batches = list(token_budget_batches(lengths, 128))
    rows = np.concatenate(batches)
    assert sorted(rows) == np.flatnonzero(lengths).tolist()
    assert (np.diff(lengths[rows]) <= 0).all()
    assert all(len(batch) * lengths[batch].max() <= 128 for batch in batches)


def test_a_row_over_the_budget_stands_alone() -> None:
    assert [batch.tolist() for batch in token_budget_batches(np.array([2, 9, 2]), 4)] == [[1], [0, 2]]


def test_spans() -> None:
    assert spans(np.array([7, 3, 0]), np.array([2, 0, 3])).tolist() == [7, 8, 0, 1, 2]


def test_a_sample_at_the_limit_is_taken_and_one_over_it_named(batch_of: BatchOf) -> None:
    check_lengths(batch_of("...x"), 4)
    with pytest.raises(ValueError, match="sample s1 has 5 tokens, more than the 4"):
        check_lengths(batch_of("...x", "....x"), 4)


@pytest.mark.parametrize("wrong", [-1, 211])
def test_an_id_outside_the_vocabulary_is_named(batch_of: BatchOf, wrong: int) -> None:
    batch = batch_of(".x", ".xx", ".x")
    check_vocabulary(batch, 211)
    batch.input_ids[4] = wrong
    with pytest.raises(ValueError, match=f"sample s1 holds token id {wrong}"):
        check_vocabulary(batch, 211)
