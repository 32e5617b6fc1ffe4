"""Rows of the inputs to tokenized samples, a batch at a time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pear_data.chat.messages import Conversation
from pear_data.chat.tokenization import UNPRECEDED, ChatTokenizer, TokenizedSample
from pear_data.corpus.examples import Example, Plan
from pear_data.corpus.layouts import Tokens
from pear_data.corpus.records import Rejected, rejected
from pear_data.errors import SampleError
from pear_data.store.manifest import Cursor

BATCH_ROWS = 256
BATCH_BYTES = 1 << 20
ROWS, BLANK = "rows read", "blank lines passed over"

Outcome = list[TokenizedSample] | SampleError
Of = TypeVar("Of")


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of the corpus to be; `place` says where it came from."""

    place: str
    sample_id: str
    source: str
    label: int
    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    record: str


@dataclass(slots=True)
class Batch:
    """What became of consecutive rows, the last of which `cursor` points behind.

    `rejected` pairs an input's name with a row. `counts` are the rows read, the blank lines passed over and the
    tokenizer's decisions.
    """

    cursor: Cursor
    samples: list[Sample] = field(default_factory=list)
    rejected: list[tuple[str, Rejected]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)


def tokenized_batches(
    plans: Sequence[Plan], chat: ChatTokenizer | None, start: Cursor, limit: int | None, budget: int
) -> Iterator[Batch]:
    """The rows behind `start`, at most `limit` of them, in batches of about `budget` bytes.

    Where batches end depends on nothing but `start`, so that a run resumed there continues with the same batches.
    `chat` is needed where an input does not come tokenized.

    Raises:
        PearError: a file is damaged.
        UsageError: the chat template rewrites earlier turns and no choice was made.
    """
    rows = itertools.islice(_rows_behind(plans, start), limit)
    cursor = start
    while batch := take(rows, budget):
        result = tokenized([(plans[index].input.name, row) for index, row in batch], chat, _behind(batch))
        result.counts.update(_read(cursor, batch))
        cursor = result.cursor
        yield result


def _rows_behind(plans: Sequence[Plan], start: Cursor) -> Iterator[tuple[int, Example | Rejected]]:
    for index in range(start.input, len(plans)):
        for row in plans[index].examples(skip=start.row if index == start.input else 0):
            yield index, row


def take(rows: Iterator[tuple[Of, Example | Rejected]], budget: int) -> list[tuple[Of, Example | Rejected]]:
    """The next rows, each with what it is of: BATCH_ROWS of them, or fewer of `budget` bytes."""
    taken: list[tuple[Of, Example | Rejected]] = []
    size = 0
    while len(taken) < BATCH_ROWS and size < budget and (item := next(rows, None)):
        taken.append(item)
        size += _size(item[1])
    return taken


def _size(row: Example | Rejected) -> int:
    if isinstance(row, Rejected):
        return len(row.raw)
    return len(row.record) + (row.content.input_ids.nbytes if isinstance(row.content, Tokens) else 0)


def _behind(rows: list[tuple[int, Example | Rejected]]) -> Cursor:
    index, row = rows[-1]
    return Cursor(input=index, row=row.number)


def _read(before: Cursor, rows: list[tuple[int, Example | Rejected]]) -> Counter[str]:
    """How many rows these are, and how many blank lines stand before and between them."""
    counts = Counter({ROWS: len(rows)})
    for index, row in rows:
        counts[BLANK] += row.number - 1 - (before.row if before.input == index else 0)
        before = Cursor(input=index, row=row.number)
    return counts


def tokenized(
    rows: Sequence[tuple[str, Example | Rejected]], chat: ChatTokenizer | None, cursor: Cursor
) -> Batch:
    """What becomes of rows, each with its input's name.

    Raises:
        UsageError: the chat template rewrites earlier turns and no choice was made.
    """
    batch = Batch(cursor)
    conversations = [
        row.content for _, row in rows if isinstance(row, Example) and isinstance(row.content, Conversation)
    ]
    notes = Counter(chat.notes()) if chat else Counter()
    encoded = iter(chat.encode(conversations) if chat and conversations else [])
    batch.counts.update(Counter(chat.notes()) - notes if chat else {})
    for name, row in rows:
        if isinstance(row, Rejected):
            batch.rejected.append((name, row))
            continue
        outcome = _as_is(row.content, batch.counts) if isinstance(row.content, Tokens) else next(encoded)
        if isinstance(outcome, SampleError):
            batch.rejected.append((name, rejected(row.number, str(outcome), row.row.raw())))
        else:
            batch.samples += [_sample(f"{name}:{row.number}", row, part) for part in outcome]
    return batch


def _as_is(tokens: Tokens, counts: Counter[str]) -> Outcome:
    counts[UNPRECEDED] += tokens.scored_first
    return [TokenizedSample("", tokens.input_ids.astype(np.int32), tokens.loss_mask)]


def _sample(place: str, row: Example, tokens: TokenizedSample) -> Sample:
    sample_id = f"{row.sample_id}{tokens.sample_suffix}"
    return Sample(place, sample_id, row.source, row.label, tokens.input_ids, tokens.loss_mask, row.record)
