"""Texts to token ids, with the token index of given character boundaries.

A boundary is where scored text begins or ends. The policy goes on from the tokens of the text before it, so a
token that lies across a boundary is undone: the text before and the text behind are tokenized apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from pear_data.errors import SampleError

# Read in front of a text tokenized apart, so that the tokenizer adds no start-of-text space to it; the first that
# shares no token with the text is used.
_ANCHORS = ("\n", "x", ".", "1", "中", '"')


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, the token index of each boundary, and how many boundaries lay inside a token."""

    ids: npt.NDArray[np.int32]
    positions: list[int]
    splits: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text tokenized in one go. Character c of the whole text is character c - shift of the encoding's text."""

    encoding: Encoding
    shift: int
    skip: int  # tokens of the encoding that belong to its anchor


class BoundaryEncoder:
    """Encodes texts with a backend tokenizer, adding no special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.get_added_tokens_decoder())

    def encode(
        self, texts: Sequence[str], boundaries: Sequence[Sequence[int]]
    ) -> list[Encoded | SampleError]:
        """Each text's ids; `boundaries[i]` are ascending characters of `texts[i]`.

        A text that cannot be tokenized apart at a boundary gives a SampleError in its place.
        """
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            self._encoded(text, encoding, wanted)
            for text, encoding, wanted in zip(texts, encodings, boundaries, strict=True)
        ]

    def _encoded(self, text: str, encoding: Encoding, boundaries: Sequence[int]) -> Encoded | SampleError:
        cuts: list[int] = []
        pieces = [_Piece(encoding, 0, 0)]
        while True:
            positions, across = self._locate(text, pieces, cuts, boundaries)
            if not across:
                ids = [np.asarray(p.encoding.ids[p.skip :], dtype=np.int32) for p in pieces]
                return Encoded(np.concatenate(ids), positions, len(cuts))
            cuts = sorted([*cuts, *across])
            try:
                pieces = self._pieces(text, cuts)
            except SampleError as error:
                return error

    def _locate(
        self, text: str, pieces: Sequence[_Piece], cuts: Sequence[int], boundaries: Sequence[int]
    ) -> tuple[list[int], set[int]]:
        """The token index of each boundary that lies between tokens, and the boundaries that lie inside one."""
        ends = [*cuts, len(text)]
        bases = np.cumsum([0, *(len(p.encoding) - p.skip for p in pieces)]).tolist()
        positions, across = [], set()
        for boundary in boundaries:
            k = bisect_right(cuts, boundary)
            is_cut = k > 0 and cuts[k - 1] == boundary
            index = 0 if is_cut else self._token_at(text, pieces[k], boundary, ends[k])
            if index is None:
                across.add(boundary)
            else:
                positions.append(bases[k] + index)
        return positions, across

    def _pieces(self, text: str, cuts: Sequence[int]) -> list[_Piece]:
        """The text tokenized apart at `cuts`."""
        starts = [0, *cuts]
        parts = [text[start:end] for start, end in zip(starts, [*cuts, len(text)], strict=True)]
        anchored = [parts[0], *(_ANCHORS[0] + part for part in parts[1:])]
        first, *others = self._tokenizer.encode_batch(anchored, add_special_tokens=False)
        pieces = [_Piece(first, 0, 0)]
        for start, part, encoding in zip(cuts, parts[1:], others, strict=True):
            pieces.append(self._behind_anchor(part, start, encoding))
        return pieces

    def _behind_anchor(self, part: str, start: int, encoding: Encoding) -> _Piece:
        """The tokens of `part`, which starts at `start`, behind the first anchor that shares no token with it."""
        for anchor in _ANCHORS:
            text = anchor + part
            if anchor != _ANCHORS[0]:
                encoding = self._tokenizer.encode(text, add_special_tokens=False)
            skip = self._token_at(text, _Piece(encoding, 0, 0), len(anchor), len(text))
            if skip is not None:
                return _Piece(encoding, start - len(anchor), skip)
        raise SampleError(f"the text cannot be tokenized apart at character {start}")

    def _token_at(self, text: str, piece: _Piece, boundary: int, end: int) -> int | None:
        """The first token of `piece` behind `boundary`, less its anchor's; None where a token lies across."""
        # Normalizers may drop characters: the next one that a token has decides.
        for char in range(boundary, end):
            token = piece.encoding.char_to_token(char - piece.shift)
            if token is not None:
                break
        else:
            return len(piece.encoding) - piece.skip
        chars = piece.encoding.token_to_chars(token)
        assert chars is not None  # the token was found by a character
        start = chars[0] + piece.shift
        if start >= boundary:
            return token - piece.skip
        # An added token may take in the white space around it; what it spells itself is on one side.
        if piece.encoding.ids[token] in self._added and text[start:boundary].strip():
            return token + 1 - piece.skip
        return None
