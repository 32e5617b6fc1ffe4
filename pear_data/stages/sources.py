"""Where a policy's log-probs come from: an engine that runs its model, or a field recorded at generation time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.engines.base import OnTokens
from pear_data.errors import SampleError, UsageError
from pear_data.progress import Progress
from pear_data.runners.base import Scorer
from pear_data.schema import (
    STATUS_BAD_FIELD,
    STATUS_FAILED,
    STATUS_NONFINITE,
    STATUS_OK,
    STATUS_TOO_LONG,
)
from pear_data.tokens import TokenBatch

Floats = npt.NDArray[np.float32]
Status = npt.NDArray[np.object_]
SHOWN_REASONS = 5


@dataclass(frozen=True, slots=True)
class Spans:
    """Stretches of scored tokens that a foreign tokenizer splits otherwise; a row's lengths sum to its num_scored."""

    tokens: npt.NDArray[np.int32]  # scored tokens of each span, flat over the rows
    per_row: npt.NDArray[np.int64]  # spans of each row, [n]


@dataclass(frozen=True, slots=True)
class GroupScores:
    """One row group under one policy. Rows whose status is not ok hold arbitrary log-probs."""

    logprobs: Floats  # of the scored tokens, flat
    status: Status  # [n]
    spans: Spans | None = None
    reasons: Mapping[int, str] = field(default_factory=dict)  # why a row has status failed


@dataclass(frozen=True, slots=True)
class PolicySource:
    """Where one policy's log-probs come from.

    `settings` determine them. `score_group(batch, records, on_tokens)` scores a row group, `records` holding its
    `corpus_columns`, for as many threads at once as there are `workers`. `check_batch` refuses a batch this source
    cannot score. `close` ends what scores, for good; calls under way raise. `decisions` go into the manifest.
    """

    settings: dict[str, Any]
    score_group: Callable[[TokenBatch, pa.Table, OnTokens], GroupScores]
    corpus_columns: tuple[str, ...] = ()
    check_batch: Callable[[TokenBatch], None] = lambda batch: None
    workers: int = 1
    decisions: Mapping[str, str] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


def engine_source(scorer: Scorer, max_length: int | None, workers: int = 1) -> PolicySource:
    """Log-probs computed by engines; rows longer than `max_length` or the engine allows are too_long.

    `workers` batches of a row group are scored at once, so that no engine idles where few shards are left.
    """
    longest = min(max_length or scorer.max_length, scorer.max_length)

    def score_group(batch: TokenBatch, records: pa.Table, on_tokens: OnTokens) -> GroupScores:
        status = np.full(len(batch), STATUS_OK, dtype=object)
        reasons: dict[int, str] = {}
        fits = batch.num_tokens <= longest
        status[~fits] = STATUS_TOO_LONG
        on_tokens(int(batch.num_tokens[~fits].sum()))
        logprobs = np.zeros(int(batch.loss_mask.sum()), dtype=np.float32)
        calls = list(_calls(batch, np.flatnonzero(fits), scorer.batch_tokens))
        count = _one_at_a_time(on_tokens)
        with ThreadPoolExecutor(workers) as threads:
            found = threads.map(lambda rows: scorer.score(batch.take(rows), count), calls)
            for rows, scored in zip(calls, found, strict=True):
                lengths = batch.num_scored[rows]
                starts = np.cumsum(lengths) - lengths
                into = np.repeat(batch.scored_offsets[rows] - starts, lengths) + np.arange(lengths.sum())
                logprobs[into] = scored.logprobs
                finite = np.logical_and.reduceat(np.isfinite(scored.logprobs), starts)
                status[rows[~finite]] = STATUS_NONFINITE
                failed = {int(rows[row]): reason for row, reason in scored.failures.items()}
                status[list(failed)] = STATUS_FAILED
                reasons |= failed
        return GroupScores(logprobs, status, reasons=reasons)

    return PolicySource({**scorer.identity(), "max_length": longest}, score_group, workers=workers)


def _one_at_a_time(on_tokens: OnTokens) -> OnTokens:
    """`on_tokens` for several threads."""
    counting = threading.Lock()

    def counted(count: int) -> None:
        with counting:
            on_tokens(count)

    return counted


def _calls(batch: TokenBatch, rows: npt.NDArray[np.int64], budget: int) -> Iterator[npt.NDArray[np.int64]]:
    """Runs of `rows` of about `budget` tokens, one engine call each."""
    ends = np.cumsum(batch.num_tokens[rows])
    first = 0
    while first < len(rows):
        start = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, start + budget, side="right")))
        yield rows[first:last]
        first = last


def recorded_source(field: str, progress: Progress) -> PolicySource:
    """Log-probs from a field of the original rows: one per scored token, finite and <= 0, or status bad_field."""
    shown = 0

    def score_group(batch: TokenBatch, records: pa.Table, on_tokens: OnTokens) -> GroupScores:
        nonlocal shown
        rows = [json.loads(record) for record in records["record"].to_pylist()]
        if not any(field in row for row in rows):
            raise UsageError(
                f"--from-field {field}: no row from {batch.sample_ids[0]} on has it; fields: {', '.join(rows[0])}"
            )
        status = np.full(len(batch), STATUS_OK, dtype=object)
        parts: list[Floats] = []
        for index, (row, length) in enumerate(zip(rows, batch.num_scored.tolist(), strict=True)):
            try:
                parts.append(_recorded(row, field, length))
            except SampleError as error:
                status[index] = STATUS_BAD_FIELD
                parts.append(np.zeros(length, dtype=np.float32))
                shown += 1
                if shown <= SHOWN_REASONS:
                    progress.say(f"{batch.sample_ids[index]}: {error}")
        on_tokens(int(batch.num_tokens.sum()))
        return GroupScores(np.concatenate(parts), status)

    return PolicySource({"engine": "recorded", "from_field": field}, score_group, ("record",))


def _recorded(row: dict[str, Any], field: str, length: int) -> Floats:
    values = row.get(field)
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise SampleError(f"{field} is not a list of numbers")
    if len(values) != length:
        raise SampleError(f"{field} has {len(values)} log-probs for {length} scored tokens")
    try:
        with np.errstate(over="ignore"):
            logprobs = np.asarray(values, dtype=np.float64).astype(np.float32)
    except OverflowError:  # an integer beyond any float
        raise SampleError(f"{field} has a log-prob that is not finite") from None
    if not np.isfinite(logprobs).all():
        raise SampleError(f"{field} has a log-prob that is not finite")
    if (logprobs > 0).any():
        raise SampleError(f"{field} has a log-prob above 0")
    return logprobs
