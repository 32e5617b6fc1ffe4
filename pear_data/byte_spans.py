"""The smallest spans on which two tokenizations of the same text agree, from where their tokens end.

Both texts are laid on one axis, segment by segment: segments of the same bytes one position a byte, segments that stand
for each other (the end-of-turn token of one chat template and that of the other) one position in all, segments that
only one of the two has none. A token boundary both tokenizations have at the same position is a span's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segments:
    """Pieces of one text side by side with those of the other, in order; lengths in bytes, [k] each.

    `same` pieces have the same bytes. Only `same` pieces have positions inside them.
    """

    first: IntArray
    second: IntArray
    same: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, int, bool]]) -> Segments:
        """From (bytes of the first, bytes of the second, same) of each piece."""
        table = np.array(pieces, dtype=np.int64).reshape(-1, 3)
        return cls(table[:, 0], table[:, 1], table[:, 2] > 0)


def common_ends(first_ends: IntArray, second_ends: IntArray, segments: Segments) -> tuple[IntArray, IntArray]:
    """Which tokens of the first and of the second text end where both texts have a token's end, [spans] each.

    `first_ends` and `second_ends` are bytes of the texts, ascending: where their tokens end. Where several tokens end
    at one position (a piece that the other text lacks), the first does, and the others belong to the next span.
    """
    wide = np.where(segments.same, segments.first, (segments.first > 0) & (segments.second > 0))
    starts = np.cumsum(wide) - wide
    first_at, first_token = _positions(_on_axis(first_ends, segments.first, starts, wide, segments.same))
    second_at, second_token = _positions(_on_axis(second_ends, segments.second, starts, wide, segments.same))
    _, first, second = np.intersect1d(first_at, second_at, assume_unique=True, return_indices=True)
    return first_token[first], second_token[second]


def span_lengths(last_tokens: IntArray) -> IntArray:
    """Tokens of each span, from the tokens that end them."""
    return np.diff(last_tokens, prepend=-1)


def _positions(position: IntArray) -> tuple[IntArray, IntArray]:
    """Each position that a token ends at, and the first token that does."""
    kept = np.flatnonzero(position > 0)
    unique, index = np.unique(position[kept], return_index=True)
    return unique, kept[index]


def _on_axis(
    ends: IntArray, lengths: IntArray, starts: IntArray, wide: IntArray, same: npt.NDArray[np.bool_]
) -> IntArray:
    """The axis position of each end; -1 inside a segment that is not the same in both texts."""
    there = np.flatnonzero(lengths)
    segment_ends = np.cumsum(lengths[there])
    k = np.searchsorted(segment_ends, ends)
    at_end = segment_ends[k] == ends
    segment = there[k]
    inside = starts[segment] + ends - (segment_ends[k] - lengths[segment])
    return np.where(same[segment], inside, np.where(at_end, starts[segment] + wide[segment], -1))
