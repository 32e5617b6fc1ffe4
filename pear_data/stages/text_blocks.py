"""Blocks that are pieces of a response's text: lines, sentences, or what a regular expression ends.

The text of a turn is that of its scored tokens. A block ends with the token in which a match ends, and with the turn.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pear_data.config import WeightSettings
from pear_data.errors import UsageError
from pear_data.store import Store

Counts = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

# Each takes the blank lines behind it along, and begins with a set of characters, which searches far faster than an
# alternative does. No run of characters is tried from more than one start.
_BLANK_LINES = r"(?:\s*\n)?"
LINES = rf"\n{_BLANK_LINES}"
_STOPS, _CJK_STOPS = ".!?…؟\u06d4।", "。\uff01\uff1f\uff0e｡"
_CLOSING = r"""["'”\u2019»\u203a)\]}」』》〉】\uff09\uff3d*_]*+"""
_SENTENCE = rf"(?<=[{_STOPS}])(?<![{_STOPS}]{{2}})[{_STOPS}]*+{_CLOSING}(?=\s|\Z)"
_CJK_SENTENCE = rf"(?<=[{_CJK_STOPS}])[{_CJK_STOPS}]*+{_CLOSING}"
SENTENCES = rf"[\n{_STOPS}{_CJK_STOPS}](?:(?<=\n)|{_SENTENCE}|{_CJK_SENTENCE}){_BLANK_LINES}"

# Tokens worked on at once, for they take a hundred bytes each; a longer turn stands alone.
_CHUNK_TOKENS = 1 << 17


def open_block_cutter(store: Store, settings: WeightSettings) -> BlockCutter:
    """What cuts the corpus of `store` into the blocks of `settings`, whose `block_by` is not tokens.

    Raises:
        UsageError: the store has no tokenizer, or one whose tokens do not say which text they are.
        MismatchError: the store's tokenizer is damaged.
    """
    known = store.manifest.tokenizer
    if known is None or not known.files:
        raise UsageError(
            f"{store.path} has no tokenizer, so the text of its tokens is not known: use --block-by tokens"
        )
    paths = [store.file(file) for file in known.files]
    text, lengths = _bytes_of_ids(paths[0].parent, known.name, tuple(file.sha256 for file in known.files))
    return BlockCutter.of(settings, text, lengths)


@functools.lru_cache(maxsize=1)
def _bytes_of_ids(folder: Path, name: str, checksums: tuple[str, ...]) -> tuple[Bytes, Counts]:
    """The bytes of every token id of a tokenizer, back to back, and how many each has [V].

    A process asks for each of its shards, and reading a large vocabulary takes longer than weighting one.
    """
    # They import torch; weighting by tokens does without.
    from pear_data.chat.token_bytes import TokenBytes
    from pear_data.chat.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    try:
        tokens = TokenBytes(tokenizer)
    except UsageError as error:
        raise UsageError(
            f"the tokens of {name} are neither byte-level BPE's nor SentencePiece's, so their text is not known: "
            "use --block-by tokens"
        ) from error
    ids = np.arange(max(tokenizer.get_vocab().values()) + 1)
    lengths = tokens.lengths(ids)
    return tokens.joined(ids, lengths), lengths


@dataclass(frozen=True, slots=True)
class BlockCutter:
    """Cuts scored tokens into blocks by their text; plain arrays, so that workers need no tokenizer.

    pattern      its matches end blocks; empty ones do not count
    text         bytes of every token id, back to back
    lengths      bytes of every token id [V]
    starts       where in `text` those of every token id start [V]
    """

    pattern: re.Pattern[str]
    text: Bytes
    lengths: Counts
    starts: Counts

    @classmethod
    def of(cls, settings: WeightSettings, text: Bytes, lengths: Counts) -> BlockCutter:
        """The cutter of `settings` for token ids of these bytes."""
        pattern = {"lines": LINES, "sentences": SENTENCES, "regex": settings.block_regex}[settings.block_by]
        assert pattern is not None  # WeightSettings sees to it
        return cls(re.compile(pattern), text, lengths, np.cumsum(lengths) - lengths)

    def block_lengths(
        self, input_ids: npt.NDArray[np.int32], loss_mask: Bools, lengths: npt.NDArray[np.integer]
    ) -> Counts:
        """Scored tokens of each block [K], back to back over n samples: all at least 1, none across two turns.

        Args:
            input_ids: Tokens of the samples, flat [L].
            loss_mask: Whether each is scored [L].
            lengths: Tokens of each sample [n], summing to L.
        """
        turns = _turn_offsets(loss_mask, lengths)
        ids = input_ids[loss_mask]
        ends = np.zeros(len(ids) + 1, dtype=np.bool_)  # whether a block ends before each token
        ends[turns] = True
        for first, last in _chunks(turns):
            start, end = turns[first], turns[last]
            ends[start + self._begins(ids[start:end], turns[first : last + 1] - start)] = True
        return np.diff(np.flatnonzero(ends))

    def _begins(self, ids: npt.NDArray[np.int32], turns: Counts) -> Counts:
        """The places behind the tokens in which matches end, among the tokens `ids`, cut into turns at `turns`."""
        lengths = self.lengths[ids]
        behind = np.cumsum(lengths)  # the byte behind each token
        places = np.repeat(self.starts[ids] - (behind - lengths), lengths) + np.arange(lengths.sum())
        text = self.text[places].tobytes()
        bounds = np.concatenate(([0], behind))[turns].tolist()
        found = [
            _match_ends(self.pattern, text[start:end]) + start for start, end in itertools.pairwise(bounds)
        ]
        begins: Counts = np.searchsorted(behind, np.concatenate(found)) + 1
        return begins


def _turn_offsets(loss_mask: Bools, lengths: npt.NDArray[np.integer]) -> Counts:
    """Where each run of scored positions starts among the scored tokens, and their number: [turns + 1]."""
    first = loss_mask.copy()
    first[1:] &= ~loss_mask[:-1]
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[lengths > 0]
    first[starts] = loss_mask[starts]
    of_scored = first[loss_mask]
    return np.append(np.flatnonzero(of_scored), len(of_scored))


def _chunks(turns: Counts) -> Iterator[tuple[int, int]]:
    """Ranges of whole turns of about `_CHUNK_TOKENS` tokens."""
    first, count = 0, len(turns) - 1
    while first < count:
        fitting = int(np.searchsorted(turns, turns[first] + _CHUNK_TOKENS, side="right")) - 1
        last = max(first + 1, fitting)
        yield first, last
        first = last


def _match_ends(pattern: re.Pattern[str], text: bytes) -> Counts:
    """The byte behind each match that is not empty; bytes that are no UTF-8 count as characters of their own."""
    characters = text.decode("utf-8", "surrogateescape")
    ends = np.array(
        [end for start, end in map(re.Match.span, pattern.finditer(characters)) if end > start],
        dtype=np.int64,
    )
    if len(characters) == len(text) or not len(ends):
        return ends
    codes = np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    escaped = (codes >= 0xDC80) & (codes <= 0xDCFF)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    widths[escaped] = 1
    return np.cumsum(widths)[ends - 1]
