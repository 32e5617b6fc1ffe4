"""The bytes that each token stands for: what two tokenizations of one text have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pear_data.chat.tokenizers import BYTE_TOKEN
from pear_data.errors import UsageError

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.integer]
Lengths = npt.NDArray[np.int64]

_SPACE = ord(" ")


class TokenBytes:
    """A tokenizer's tokens as bytes: parts of characters as they are, added tokens as they are written.

    Raises UsageError for a tokenizer whose tokens do not say their bytes (neither byte-level BPE nor SentencePiece).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        spelled = _spelling(json.dumps(settings["decoder"]), type(tokenizer).__name__)
        vocabulary = tokenizer.get_vocab()
        pieces = [b""] * (max(vocabulary.values()) + 1)
        for piece, token_id in vocabulary.items():
            pieces[token_id] = spelled(piece)
        self._added = np.zeros(len(pieces), dtype=np.bool_)
        for token in settings["added_tokens"]:
            pieces[token["id"]] = token["content"].encode()
            self._added[token["id"]] = True
        self._lengths: Lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._bytes: Bytes = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def text(self, ids: Iterable[int]) -> bytes:
        """The bytes of a few tokens, one after the other."""
        tokens = np.fromiter(ids, dtype=np.int64)
        return self.joined(tokens, self.lengths(tokens)).tobytes()

    def lengths(self, ids: Ids) -> Lengths:
        """Bytes of each token."""
        return self._lengths[ids]

    def joined(self, ids: Ids, lengths: Lengths) -> Bytes:
        """The last `lengths` bytes of each token, flat."""
        starts = self._starts[ids] + self._lengths[ids] - lengths
        before = np.cumsum(lengths) - lengths
        joined: Bytes = self._bytes[np.repeat(starts - before, lengths) + np.arange(lengths.sum())]
        return joined

    def without_added_spaces(self, ids: Ids, previous: Ids) -> Lengths:
        """Bytes of each token where SentencePiece's own space before a text is none of the text's.

        It is put where a text begins: behind added tokens. `previous` are the tokens before `ids`.
        """
        lengths = self._lengths[ids]
        first = self._bytes[np.minimum(self._starts[ids], len(self._bytes) - 1)]
        spaced = self._added[previous] & ~self._added[ids] & (lengths > 0) & (first == _SPACE)
        left: Lengths = lengths - spaced
        return left


def _spelling(decoder: str, name: str) -> Callable[[str], bytes]:
    if '"ByteLevel"' in decoder:
        byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
        return lambda piece: _from_byte_level(piece, byte_of)
    if '"Metaspace"' in decoder or '"ByteFallback"' in decoder:
        return _from_sentence_piece
    raise UsageError(
        f"the tokens of {name} are neither byte-level BPE's nor SentencePiece's, so which bytes they cover is not "
        "known: --align bytes cannot compare them; log-probs recorded at generation time can be (--from-field)"
    )


def _from_byte_level(piece: str, byte_of: dict[str, int]) -> bytes:
    if all(char in byte_of for char in piece):
        return bytes(byte_of[char] for char in piece)
    return piece.encode()


def _from_sentence_piece(piece: str) -> bytes:
    if BYTE_TOKEN.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
