"""Rows in chunks of about one size, parted anywhere or where sequences begin."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_data.loss import chunks
from pear_data.loss.chunks import fits_in_a_chunk, split_rows

VOCABULARY = 100
HEAD = torch.empty(VOCABULARY, 4)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), chunk_rows=st.integers(1, 40))
def test_chunks_are_whole_sequences_until_there_are_enough_rows(lengths: list[int], chunk_rows: int) -> None:
    begins = torch.tensor([0, *accumulate(lengths)][:-1])
    rows = torch.arange(7, 7 + sum(lengths))
    parts = split_rows(HEAD, rows, chunk_rows, begins)
    assert torch.equal(torch.cat(parts), rows)
    assert {int(part[0]) - 7 for part in parts} <= set(begins.tolist())
    assert all(chunk_rows <= len(part) < chunk_rows + max(lengths) for part in parts[:-1])
    assert len(parts[-1]) < chunk_rows + max(lengths)


def test_no_sequence_is_added_beyond_the_bytes_of_a_large_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_LARGE_CHUNK_BYTES", 600 * VOCABULARY * 4)
    begins = torch.tensor([0, 200, 350, 360, 700, 701])
    parts = split_rows(HEAD, torch.arange(1000), None, begins)
    assert [len(part) for part in parts] == [360, 341, 299]
    assert fits_in_a_chunk(HEAD, 600)
    assert not fits_in_a_chunk(HEAD, 601)


def test_without_sequences_they_are_even() -> None:
    assert [len(part) for part in split_rows(HEAD, torch.arange(1100), None, None)] == [384, 384, 332]
    assert [len(part) for part in split_rows(HEAD, torch.arange(300), None, None)] == [300]
    assert [len(part) for part in split_rows(HEAD, torch.arange(10), 4, None)] == [4, 4, 2]
    assert split_rows(HEAD, torch.arange(0), None, torch.arange(0)) == ()
