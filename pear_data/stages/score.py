"""Log-probs of a corpus's scored tokens under one policy, one file per shard."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.config import ScoreSettings
from pear_data.corpus.batches import token_batches
from pear_data.progress import Outcome, Progress
from pear_data.schema import FLOATS, INT32S, SCORES, STATUS_OK
from pear_data.stages.sources import GroupScores, PolicySource, Spans, open_source
from pear_data.store import Store
from pear_data.store.columns import list_column
from pear_data.store.manifest import CORPUS, Shard
from pear_data.store.shards import parquet_shard, write_group
from pear_data.tokens import TokenBatch


def score(
    store: Store,
    settings: ScoreSettings,
    source: PolicySource,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Outcome:
    """Score every shard that lacks this policy's log-probs.

    Raises:
        UsageError: the corpus is not ingested completely.
        MismatchError: the policy was scored with other settings, or would be given other token ids than the
            corpus holds.
    """
    corpus = store.complete_stage(CORPUS)
    key = f"scores/{settings.policy}"
    stage_settings = {**source.settings, "inputs": {CORPUS: corpus.fingerprint}}
    stage = store.begin(key, stage_settings, overwrite=overwrite)
    pending = [
        shard
        for shard in corpus.shards
        if not store.is_current(key, stage.shard(shard.name), {CORPUS: shard.file.sha256})
    ]
    stage.complete = stage.complete and not pending
    total = sum(shard.num_tokens for shard in corpus.shards)
    progress.begin(key, total, "tokens", done=total - sum(shard.num_tokens for shard in pending))
    try:
        for shard in pending:
            entry = _score_shard(store, key, shard, source, progress)
            store.commit(key, entry)
            progress.shard(shard.name, f"{entry.rows} samples, {entry.num_scored} scored tokens")
    finally:
        progress.end()
    stage.complete = True
    store.save()
    return _outcome(store, key, resumed=len(corpus.shards) - len(pending))


def score_policy(
    store: Store, settings: ScoreSettings, progress: Progress, *, overwrite: bool = False
) -> Outcome:
    """Open the source that `settings` ask for and `score` with it.

    Raises:
        PearError: the model cannot be loaded.
        UsageError, MismatchError: as `open_source` and `score`.
    """
    store.complete_stage(CORPUS)
    with open_source(store, settings, progress) as source:
        return score(store, settings, source, progress, overwrite=overwrite)


def _score_shard(store: Store, key: str, shard: Shard, source: PolicySource, progress: Progress) -> Shard:
    final = store.path / key / f"{shard.name}.parquet"
    statuses: Counter[str] = Counter()
    scored = 0
    records = store.row_groups(shard, ["sample_id", *source.corpus_columns])
    with parquet_shard(final, SCORES) as writer:
        for batch, record in zip(token_batches(store, shard), records, strict=True):
            source.check_batch(batch)
            scores = source.score_group(batch, record, progress.advance)
            write_group(writer, _score_rows(batch, scores))
            statuses.update(scores.status.tolist())
            scored += int(batch.num_scored[scores.status == STATUS_OK].sum())
    return Shard(
        name=shard.name,
        file=store.entry_of(final),
        rows=shard.rows,
        num_tokens=scored,
        num_scored=scored,
        counts=dict(statuses),
        inputs={CORPUS: shard.file.sha256},
    )


def _score_rows(batch: TokenBatch, scores: GroupScores) -> pa.Table:
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


def _outcome(store: Store, key: str, resumed: int) -> Outcome:
    stage = store.stage(key)
    statuses: Counter[str] = Counter()
    for shard in stage.shards:
        statuses.update(shard.counts)
    rejected = sum(count for status, count in statuses.items() if status != STATUS_OK)
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items()))
    earlier = f"; {resumed} of {len(stage.shards)} shards were there already" if resumed else ""
    return Outcome(
        f"{key}: {stage.num_scored:,} scored tokens in {stage.rows:,} samples ({counts}){earlier}", rejected
    )
