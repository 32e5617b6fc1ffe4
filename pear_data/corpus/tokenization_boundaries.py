"""Texts to token ids, with the token index of given character boundaries.

A boundary is where scored text begins or ends. The policy goes on from the tokens of the text before it, so a
token that lies across a boundary is undone: the text before and the text behind are tokenized apart.
"""

from __future__ import annotations

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
        while True:
            pieces = [_Piece(encoding, 0, 0)]
            if cuts:
                ends = [*cuts[1:], len(text)]
                pieces = [_Piece(self._encode(text[: cuts[0]]), 0, 0)]
                for start, end in zip(cuts, ends, strict=True):
                    piece = self._encode_apart(text[start:end], start)
                    if piece is None:
                        return SampleError(f"the text cannot be tokenized apart at character {start}")
                    pieces.append(piece)
            located = self._locate(text, pieces, cuts, boundaries)
            if isinstance(located, list):
                ids = [np.asarray(p.encoding.ids[p.skip :], dtype=np.int32) for p in pieces]
                return Encoded(np.concatenate(ids), located, len(cuts))
            cuts = sorted([*cuts, located])

    def _locate(
        self, text: str, pieces: Sequence[_Piece], cuts: Sequence[int], boundaries: Sequence[int]
    ) -> list[int] | int:
        """The token index of each boundary, or the first boundary that lies inside a token."""
        starts, ends = [0, *cuts], [*cuts, len(text)]
        bases = np.concatenate(([0], np.cumsum([len(p.encoding) - p.skip for p in pieces])))
        positions = []
        for boundary in boundaries:
            k = max(i for i, start in enumerate(starts) if start <= boundary)
            if boundary in cuts:
                positions.append(int(bases[k]))
                continue
            index = self._token_at(text, pieces[k], boundary, ends[k])
            if index is None:
                return boundary
            positions.append(int(bases[k]) + index)
        return positions

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

    def _encode(self, text: str) -> Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _encode_apart(self, text: str, start: int) -> _Piece | None:
        for anchor in _ANCHORS:
            encoding = self._encode(anchor + text)
            skip = self._token_at(anchor + text, _Piece(encoding, 0, 0), len(anchor), len(anchor + text))
            if skip is not None:
                return _Piece(encoding, start - len(anchor), skip)
        return None
