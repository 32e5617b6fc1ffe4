"""Common token ends of two texts, against a dictionary of positions filled byte by byte."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_data.byte_spans import Segments, common_ends, span_lengths


def same(length):
    return length, length, True


def positions(lengths, pieces):
    """For each byte boundary of a text behind its first byte: what it is called in both texts, None if nothing."""
    names, latest = [], "start"
    for number, (length, piece) in enumerate(zip(lengths, pieces, strict=True)):
        both = piece[0] > 0 and piece[1] > 0
        for offset in range(1, length + 1):
            if piece[2]:
                names.append((number, offset))
            elif offset < length:
                names.append(None)
            else:
                names.append((number, "end") if both else latest)
        if (piece[2] and length) or both:
            latest = (number, length) if piece[2] else (number, "end")
    return names


def brute_force(first_ends, second_ends, pieces):
    found = []
    for side, ends in enumerate((first_ends, second_ends)):
        names = positions([piece[side] for piece in pieces], pieces)
        tokens = {}
        for token, end in enumerate(ends):
            name = names[end - 1] if end else "start"
            if name not in (None, "start"):
                tokens.setdefault(name, token)
        found.append(tokens)
    shared = [name for name in found[0] if name in found[1]]
    return [found[0][name] for name in shared], [found[1][name] for name in shared]


@st.composite
def texts(draw):
    """Pieces of two texts that end in one both have, and where tokens end in each."""
    piece = st.one_of(
        st.integers(0, 9).map(same),
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.just(False)),
    )
    last = st.tuples(st.integers(1, 4), st.integers(1, 4), st.just(False))
    pieces = [*draw(st.lists(piece, max_size=12)), draw(last)]
    ends = []
    for side in (0, 1):
        total = sum(piece[side] for piece in pieces)
        cuts = draw(st.lists(st.integers(0, total - 1), max_size=20))
        ends.append(sorted([*cuts, total]))
    return pieces, *ends


@settings(max_examples=300, deadline=None)
@given(texts())
def test_common_ends_are_those_of_a_byte_by_byte_search(drawn):
    pieces, first_ends, second_ends = drawn
    got = common_ends(np.array(first_ends), np.array(second_ends), Segments.of(pieces))
    want = brute_force(first_ends, second_ends, pieces)
    assert [side.tolist() for side in got] == [*map(list, want)]
    lengths = span_lengths(got[0])
    assert (lengths > 0).all()
    assert lengths.sum() == np.flatnonzero(np.array(first_ends) == first_ends[-1])[0] + 1


def test_the_same_text_ends_spans_where_both_have_a_token():
    first, second = common_ends(np.array([2, 5, 9]), np.array([3, 5, 6, 9]), Segments.of([same(9)]))
    assert (first.tolist(), second.tolist()) == ([1, 2], [1, 3])


def test_pieces_that_stand_for_each_other_are_one_span_and_added_ones_go_with_what_follows():
    pieces = [(0, 2, False), same(4), (0, 1, False), (10, 4, False)]
    first, second = common_ends(np.array([4, 14]), np.array([1, 2, 6, 7, 9, 11]), Segments.of(pieces))
    assert first.tolist() == [0, 1]
    assert second.tolist() == [2, 5]
