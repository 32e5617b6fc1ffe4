"""Rows of the corpus read with another model's tokenizer and chat template, side by side with its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa

from pear_data.chat.messages import Conversation
from pear_data.chat.spans import ScoredText
from pear_data.chat.token_bytes import Lengths, TokenBytes
from pear_data.chat.tokenization import ChatTokenizer, TokenizedSample
from pear_data.chat.turn_texts import Piece, TurnText, as_read, corresponding, turn_texts
from pear_data.corpus.stored_records import conversation_of
from pear_data.errors import SampleError
from pear_data.tokens import TokenBatch

ROWS = 256  # rendered and tokenized at once


@dataclass(frozen=True, slots=True)
class ReadRow:
    """A row as both policies read it.

    own, other    bytes of each scored token, in order: the corpus's tokens and the other tokenizer's
    samples       the other's tokens: one sample, or several where its chat template rewrites earlier turns
    pieces        the two texts side by side
    """

    own: Lengths
    other: Lengths
    samples: list[TokenizedSample]
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Reader:
    """A tokenizer with its chat template, and the bytes of its tokens."""

    chat: ChatTokenizer
    tokens: TokenBytes


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A row's turns as the corpus has them, and as the other template renders them: a text or several."""

    messages: Sequence[Any]
    own_turns: list[TurnText]
    own_lengths: Lengths
    texts: list[ScoredText]


class ForeignRows:
    """Reads rows of a corpus that `own` made with `settings` (those of the ingest) as `other` reads them."""

    def __init__(self, own: Reader, other: Reader, settings: dict[str, Any]) -> None:
        self._own, self._other = own, other
        self._fields = settings["prompt_field"], settings["response_field"]
        self._latest: tuple[str, Conversation, list[ScoredText]] | None = None

    def read(self, batch: TokenBatch, records: pa.Table) -> Iterator[ReadRow | SampleError]:
        """One for every row of `batch`, in order; `records` holds their `record`. SampleErrors say why a row cannot
        be compared."""
        for start in range(0, len(batch), ROWS):
            rows = range(start, min(start + ROWS, len(batch)))
            rendered = [
                self._rendered(batch, row, record)
                for row, record in zip(rows, records["record"].slice(start, ROWS).to_pylist(), strict=True)
            ]
            texts = [text for item in rendered if isinstance(item, _Rendered) for text in item.texts]
            samples = iter(self._other.chat.tokenize(texts))
            for item in rendered:
                yield item if isinstance(item, SampleError) else self._compared(item, samples)

    def _rendered(self, batch: TokenBatch, row: int, record: str) -> _Rendered | SampleError:
        try:
            conversation, texts = self._own_texts(record)
            text = _text_of(batch.sample_ids[row], texts)
            ids = batch.input_ids[slice(*batch.offsets[row : row + 2])]
            scored = np.flatnonzero(batch.loss_mask[slice(*batch.offsets[row : row + 2])])
            turns = turn_texts(text, self._own.tokens)
            turns, lengths = as_read(turns, self._own.tokens, ids[scored], ids[scored - 1])
            # The turns before the first of this sample's are its context, those behind its last are not there.
            through = dataclasses.replace(
                conversation.through(turns[-1].message), prompt_length=turns[0].message
            )
            return _Rendered(conversation.messages, turns, lengths, self._other.chat.scored_texts(through))
        except SampleError as error:
            return error

    def _own_texts(self, record: str) -> tuple[Conversation, list[ScoredText]]:
        # One record may be that of several samples, which are neighbours.
        if self._latest is None or self._latest[0] != record:
            conversation = conversation_of(record, self._fields)
            self._latest = record, conversation, self._own.chat.scored_texts(conversation)
        return self._latest[1:]

    def _compared(
        self, row: _Rendered, tokenized: Iterator[TokenizedSample | SampleError]
    ) -> ReadRow | SampleError:
        outcomes = [next(tokenized) for _ in row.texts]
        try:
            samples, turns, lengths = [], [], []
            for text, sample in zip(row.texts, outcomes, strict=True):
                if isinstance(sample, SampleError):
                    raise sample
                scored = np.flatnonzero(sample.loss_mask)
                ids = sample.input_ids
                read, of_tokens = as_read(
                    turn_texts(text, self._other.tokens), self._other.tokens, ids[scored], ids[scored - 1]
                )
                samples.append(sample)
                turns += read
                lengths.append(of_tokens)
            pieces = corresponding(row.own_turns, turns, row.messages)
            return ReadRow(row.own_lengths, np.concatenate(lengths), samples, pieces)
        except SampleError as error:
            return error


def _text_of(sample_id: str, texts: list[ScoredText]) -> ScoredText:
    """The text of a sample; where a row was made into several, the ids say which."""
    if len(texts) == 1:
        return texts[0]
    found = [text for text in texts if sample_id.endswith(text.suffix)]
    if len(found) != 1:
        raise SampleError("the row's turns are not those that were made into samples")
    return found[0]


def date_of(value: str | None) -> date | None:
    """A date as a stage's settings hold it."""
    return None if value is None else date.fromisoformat(value)
