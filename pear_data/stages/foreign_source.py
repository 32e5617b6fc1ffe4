"""A policy with another tokenizer: its log-probs over the smallest spans of bytes that both tokenizations share.

The model scores its own tokens of the same conversation. Its log-probs are summed over each span, and the sum is spread
evenly over the corpus's tokens of the span: sums over whole spans are the model's own, single values are not.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pear_data.byte_spans import Segments, common_ends, span_lengths
from pear_data.chat.template import read_template
from pear_data.chat.token_bytes import TokenBytes
from pear_data.chat.tokenization import RAW, ChatTokenizer
from pear_data.chat.tokenizers import load_tokenizer
from pear_data.config import ScoreSettings
from pear_data.corpus.stored_tokenizer import FOLDER
from pear_data.engines.base import OnTokens
from pear_data.errors import SampleError, UsageError
from pear_data.schema import STATUS_OK, STATUS_UNALIGNED
from pear_data.stages.foreign_rows import ForeignRows, Reader, ReadRow, date_of
from pear_data.stages.sources import GroupScores, PolicySource, Spans
from pear_data.stages.spans import ALIGNED_BY_BYTES
from pear_data.store import Store
from pear_data.store.columns import offsets_of
from pear_data.store.manifest import CORPUS
from pear_data.tokens import IntArray, TokenBatch

_DATE = "chat_template_date"  # in the settings of the corpus and of this policy's scores

APPROXIMATE = (
    "scored on tokens of its own: log-probs are exact over spans on which both tokenizations agree (span_tokens) and "
    "spread evenly over the tokens inside a span; what the chat templates put around a text (end-of-turn tokens, "
    "white space, think tags) is compared as it stands in each"
)


@dataclass(frozen=True, slots=True)
class ForeignText:
    """The corpus's rows as another model's tokenizer reads them, and the settings that determine how."""

    rows: ForeignRows
    settings: dict[str, str]


def foreign_text(store: Store, model: str, settings: ScoreSettings) -> ForeignText:
    """What `model` (a folder or Hub name) reads of the corpus; loads tokenizers only.

    Raises:
        PearError: the model has no tokenizer that can be loaded.
        UsageError: its tokenizer or chat template cannot be used for this, or the corpus came as token ids only.
        MismatchError: the store's own tokenizer is damaged.
    """
    corpus = store.complete_stage(CORPUS)
    known = store.manifest.tokenizer
    for file in known.files if known is not None else ():
        store.file(file)
    own_tokenizer = load_tokenizer(str(store.path / FOLDER), trust_remote_code=settings.trust_remote_code)
    template = None if own_tokenizer.chat_template else RAW
    today = date_of(corpus.settings.get(_DATE))
    own = ChatTokenizer(own_tokenizer, template, corpus.settings["turns"], today)
    if own.template_fingerprint() != corpus.settings["chat_template"]:
        raise UsageError(
            "--align bytes needs the corpus's text, and this one came as token ids: ingest it as messages or prompts "
            "and responses"
        )
    tokenizer = load_tokenizer(
        model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    template = _template(tokenizer, model, settings.model_template, raw=template == RAW)
    begun = store.manifest.stages.get(f"scores/{settings.policy}")
    today = today or date_of(begun.settings.get(_DATE) if begun else None) or date.today()
    # Turns that the template rewrites later are read as they were when they were the last.
    try:
        other = ChatTokenizer(tokenizer, template, "all", today)
    except UsageError as error:
        raise UsageError(f"{model}: {_of_the_model(str(error))}") from error
    made_by = {
        "align": "bytes",
        "tokenizer": other.fingerprint(),
        "chat_template": other.template_fingerprint(),
        **({_DATE: today.isoformat()} if other.writes_date else {}),
    }
    rows = ForeignRows(
        Reader(own, TokenBytes(own_tokenizer)), Reader(other, TokenBytes(tokenizer)), corpus.settings
    )
    return ForeignText(rows, made_by)


def _of_the_model(reason: str) -> str:
    """What is wrong with the model's chat template, naming the option that replaces that one."""
    return reason.replace("--chat-template", "--model-template")


def _template(tokenizer: PreTrainedTokenizerBase, model: str, given: str | None, *, raw: bool) -> str | None:
    """As `ChatTokenizer` takes it: the one given, else the model's own (None), else raw text where the corpus is."""
    if given is not None:
        return RAW if given == RAW else read_template(Path(given))
    if tokenizer.chat_template:
        return None
    if raw:
        return RAW
    raise UsageError(
        f"{model} has no chat template to render the corpus with: give one with --model-template FILE"
    )


def foreign_source(source: PolicySource, text: ForeignText) -> PolicySource:
    """`source` (a model that scores ids of its own tokenizer) brought to the corpus's tokens by `text`.

    Rows that the two policies read differently get status unaligned, each with a reason.
    """
    reading = (
        threading.Lock()
    )  # rendering and tokenizing keep counts, and templates' marks bear one thread only

    def score_group(batch: TokenBatch, records: pa.Table, on_tokens: OnTokens) -> GroupScores:
        with reading:
            outcomes = list(enumerate(text.rows.read(batch, records)))
        reasons = {
            row: _of_the_model(str(outcome)) for row, outcome in outcomes if isinstance(outcome, SampleError)
        }
        read = {row: outcome for row, outcome in outcomes if isinstance(outcome, ReadRow)}
        left = int(batch.num_tokens[list(reasons)].sum())
        on_tokens(left)
        if not read:
            return _unaligned(batch, reasons)
        foreign = _foreign_batch(batch, read)
        rescaled = _rescaled(on_tokens, len(foreign.input_ids), int(batch.num_tokens.sum()) - left)
        return _brought_back(batch, read, source.score_group(foreign, records, rescaled), reasons)

    return replace(
        source,
        settings={**source.settings, **text.settings},
        score_group=score_group,
        corpus_columns=("record",),
        decisions={ALIGNED_BY_BYTES: APPROXIMATE},
    )


def _unaligned(batch: TokenBatch, reasons: dict[int, str]) -> GroupScores:
    """A row group of which no row can be compared."""
    return GroupScores(
        np.zeros(int(batch.num_scored.sum()), dtype=np.float32),
        np.full(len(batch), STATUS_UNALIGNED, dtype=object),
        Spans(np.zeros(0, dtype=np.int32), np.zeros(len(batch), dtype=np.int64)),
        reasons,
    )


def _foreign_batch(batch: TokenBatch, read: Mapping[int, ReadRow]) -> TokenBatch:
    """The rows as the other tokenizer reads them; a row of several samples has them one after the other."""
    samples = [sample for row in read.values() for sample in row.samples]
    return TokenBatch(
        [batch.sample_ids[row] for row, item in read.items() for _ in item.samples],
        np.concatenate([sample.input_ids for sample in samples]),
        np.concatenate([sample.loss_mask for sample in samples]),
        offsets_of(np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)),
    )


def _rescaled(on_tokens: OnTokens, tokens: int, counted: int) -> OnTokens:
    """`on_tokens` for one who counts to `tokens` where the corpus counts to `counted`."""
    done = told = 0

    def rescaled(count: int) -> None:
        nonlocal done, told
        done += count
        now = done * counted // tokens
        on_tokens(now - told)
        told = now

    return rescaled


def _brought_back(
    batch: TokenBatch, read: Mapping[int, ReadRow], scores: GroupScores, reasons: dict[int, str]
) -> GroupScores:
    """The scores of the rows' foreign samples as scores of the corpus's tokens."""
    rows = np.array(list(read), dtype=np.int64)
    items = list(read.values())
    tokens, other_last = common_spans_of(items)
    starts = np.concatenate(([0], other_last[:-1] + 1))
    sums = np.add.reduceat(scores.logprobs, starts, dtype=np.float64)
    lengths = batch.num_scored[rows]
    before = np.cumsum(lengths) - lengths
    into = np.repeat(batch.scored_offsets[rows] - before, lengths) + np.arange(lengths.sum())
    logprobs = np.zeros(int(batch.num_scored.sum()), dtype=np.float32)
    logprobs[into] = np.repeat((sums / tokens).astype(np.float32), tokens)

    status = np.full(len(batch), STATUS_UNALIGNED, dtype=object)
    status[rows] = STATUS_OK
    owner = np.repeat(rows, [len(item.samples) for item in items])
    for sample in np.flatnonzero(scores.status != STATUS_OK)[::-1].tolist():
        status[owner[sample]] = scores.status[sample]
    failed = {int(owner[sample]): reason for sample, reason in scores.reasons.items()}
    per_row = np.zeros(len(batch), dtype=np.int64)
    per_row[rows] = np.diff(np.searchsorted(np.cumsum(tokens), np.cumsum(lengths), side="right"), prepend=0)
    return GroupScores(logprobs, status, Spans(tokens.astype(np.int32), per_row), {**reasons, **failed})


def common_spans_of(items: Sequence[ReadRow]) -> tuple[IntArray, IntArray]:
    """Tokens of the corpus in each span of these rows, and the last of the other tokenizer's in each, flat."""
    own, other = (
        np.cumsum(np.concatenate(parts)) for parts in zip(*((i.own, i.other) for i in items), strict=True)
    )
    own_last, other_last = common_ends(
        own, other, Segments.of([piece for item in items for piece in item.pieces])
    )
    return span_lengths(own_last), other_last
