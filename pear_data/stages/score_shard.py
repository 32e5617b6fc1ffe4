"""Scoring one shard: a row group is written while the next is scored; beside it, the samples an engine failed on."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.corpus.batches import token_batches
from pear_data.corpus.records import Rejected, rejected
from pear_data.progress import Progress
from pear_data.schema import FLOATS, INT32S, QUARANTINE, SCORES, STATUS_OK
from pear_data.stages.sources import GroupScores, PolicySource, Spans
from pear_data.store import Store
from pear_data.store.columns import list_column
from pear_data.store.commit import operation, path_beside
from pear_data.store.manifest import CORPUS, Shard
from pear_data.store.shards import parquet_shard
from pear_data.tokens import TokenBatch

Scoring = Generator[tuple[TokenBatch, GroupScores], None, None]


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample without scores, because the engine fails on it."""

    row: int  # in the shard
    sample_id: str
    reason: str


def score_shard(
    store: Store, key: str, shard: Shard, source: PolicySource, progress: Progress
) -> tuple[Shard, list[Failure]]:
    """The manifest's entry of the scored shard, whose files are in place, and what its quarantine holds.

    Raises:
        MismatchError: the shard of the corpus is damaged, or the source cannot score it.
        PearError: the source fails, or the disk refuses.
    """
    with contextlib.closing(_one_ahead(_groups(store, shard, source, progress))) as groups:
        return write_scores(
            store, key, shard, ((score_rows(batch, scores), scores.reasons) for batch, scores in groups)
        )


def write_scores(
    store: Store,
    key: str,
    shard: Shard,
    groups: Iterable[tuple[pa.Table, Mapping[int, str]]],
    *,
    replaced: Shard | None = None,
) -> tuple[Shard, list[Failure]]:
    """Put the scores of a shard in place: its row groups, each with the reasons why rows of it have none.

    The files of `replaced`, a sound shard, stay as they are: until the new one is committed it is the one there is.

    Raises:
        PearError: the disk refused.
    """
    taken = [store.path / file.path for file in replaced.files] if replaced is not None else []
    final = path_beside(store.path / key / f"{shard.name}.parquet", taken)
    statuses: Counter[str] = Counter()
    scored = first = 0
    failures: list[Failure] = []
    with parquet_shard(final, SCORES) as writer:
        for table, reasons in groups:
            writer.write(table)
            status = table["status"].to_numpy()
            statuses.update(status.tolist())
            scored += int(table["num_scored"].to_numpy()[status == STATUS_OK].sum())
            failures += [
                Failure(first + row, table["sample_id"][row].as_py(), reason)
                for row, reason in sorted(reasons.items())
            ]
            first += len(table)
    quarantine = store.path / "quarantine" / f"{key.replace('/', '-')}-{shard.name}.parquet"
    quarantine = path_beside(quarantine, taken)
    if failures:
        _write_quarantine(quarantine, store, shard, failures)
    else:
        with operation("remove", quarantine):
            quarantine.unlink(missing_ok=True)  # of an earlier, damaged shard
    entry = Shard(
        name=shard.name,
        file=store.entry_of(final),
        rows=shard.rows,
        num_tokens=scored,
        num_scored=scored,
        counts=dict(statuses),
        inputs={CORPUS: shard.file.sha256},
        quarantine=store.entry_of(quarantine) if failures else None,
        quarantined=len(failures),
    )
    return entry, failures


def _groups(store: Store, shard: Shard, source: PolicySource, progress: Progress) -> Scoring:
    records = store.row_groups(shard, ["sample_id", *source.corpus_columns])
    for batch, record in zip(token_batches(store, shard), records, strict=True):
        source.check_batch(batch)
        yield batch, source.score_group(batch, record, progress.advance)


def _one_ahead(groups: Scoring) -> Scoring:
    """The same, each made in another thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, groups, None)
        while (group := following.result()) is not None:
            following = thread.submit(next, groups, None)
            yield group


def _write_quarantine(final: Path, store: Store, shard: Shard, failures: list[Failure]) -> None:
    wanted = np.array([failure.row for failure in failures])
    first = 0
    kept: list[Rejected] = []
    for table in store.row_groups(shard, ["record"]):
        inside = wanted[(wanted >= first) & (wanted < first + len(table))] - first
        kept += [
            rejected(failure.row, failure.reason, record.encode())
            for failure, record in zip(
                failures[len(kept) :], table["record"].take(inside).to_pylist(), strict=False
            )
        ]
        first += len(table)
    columns = [
        pa.array([Path(shard.file.path).name] * len(failures), pa.string()),
        pa.array(wanted, pa.int64()),
        pa.array([row.reason for row in kept], pa.string()),
        pa.array([row.raw for row in kept], pa.binary()),
    ]
    with parquet_shard(final, QUARANTINE) as writer:
        writer.write(pa.table(columns, schema=QUARANTINE))


def score_rows(batch: TokenBatch, scores: GroupScores) -> pa.Table:
    """One row group; rows whose status is not ok have null log-probs, spans and sum."""
    ok = scores.status == STATUS_OK
    lengths = batch.num_scored
    starts = batch.scored_offsets[:-1]
    kept = np.repeat(ok, lengths)
    sums = np.add.reduceat(np.where(kept, scores.logprobs, 0.0), starts, dtype=np.float64)
    columns = [
        pa.array(batch.sample_ids, type=pa.string()),
        list_column(scores.logprobs[kept], np.where(ok, lengths, 0), FLOATS, ok),
        _span_column(scores.spans, ok),
        pa.array(lengths, type=pa.int32()),
        pa.array(sums, mask=~ok),
        pa.array(scores.status, type=pa.string()),
    ]
    return pa.table(columns, schema=SCORES)


def _span_column(spans: Spans | None, ok: npt.NDArray[np.bool_]) -> pa.Array:
    if spans is None:
        return pa.nulls(len(ok), INT32S)
    return list_column(spans.tokens[np.repeat(ok, spans.per_row)], np.where(ok, spans.per_row, 0), INT32S, ok)
