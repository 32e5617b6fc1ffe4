"""Samples that an engine failed on, scored once more by the same policy; what is scored stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_data.config import ScoreSettings
from pear_data.corpus.batches import token_batch
from pear_data.progress import OneAtATime, Outcome, Progress
from pear_data.schema import SCORES, STATUS_FAILED, STATUS_NONFINITE
from pear_data.stages.alignment import AlignedShard, aligned_row_groups, aligned_shards
from pear_data.stages.opened_source import open_source
from pear_data.stages.score import say_failures, scores_outcome
from pear_data.stages.score_shard import score_rows, write_scores
from pear_data.stages.sources import PolicySource
from pear_data.store import Store
from pear_data.store.manifest import CORPUS, Shard

# What an engine may get over. The other statuses follow from the settings and the data, and would come out the same.
RETRIED = (STATUS_FAILED, STATUS_NONFINITE)


def rescore_policy(store: Store, settings: ScoreSettings, progress: Progress) -> Outcome:
    """Open the source that `settings` ask for, if there is a sample to score again, and `rescore` with it.

    Raises:
        PearError: the model cannot be loaded.
        UsageError, MismatchError: as `open_source` and `rescore`.
    """
    key = f"scores/{settings.policy}"
    if not _pending(store, key):
        done = scores_outcome(store, key)
        return Outcome(f"no sample to score again; {done.summary}", done.rejected)
    progress = OneAtATime(progress)
    with open_source(store, settings, progress) as source:
        return rescore(store, key, source, progress)


def rescore(store: Store, key: str, source: PolicySource, progress: Progress) -> Outcome:
    """Score the samples of a policy that have a status of `RETRIED` again; the caller holds the writer's lock.

    A shard is replaced once all its samples are done; weightings made of it are then outdated, and say so.

    Raises:
        UsageError: the policy is not scored completely.
        MismatchError: it was scored with other settings, or an artefact changed on disk.
        PearError: the source fails, or the disk refuses.
    """
    pending = _pending(store, key)
    store.begin(key, {**source.settings, "inputs": {CORPUS: store.stage(CORPUS).fingerprint}})
    count = sum(map(_count, (shard.entries[key] for shard in pending)))
    progress.begin(f"{key} again", count, "samples")
    try:
        for shard in pending:
            groups = _groups(store, key, shard, source)
            entry, failures = write_scores(
                store, key, shard.entries[CORPUS], groups, replaced=shard.entries[key]
            )
            retried = _count(shard.entries[key])
            store.commit(key, entry)
            progress.advance(retried)
            progress.shard(entry.name, f"{retried} samples scored again, {len(failures)} in quarantine")
            say_failures(entry, failures, progress)
    finally:
        progress.end()
    left = sum(map(_count, store.stage(key).shards))
    done = scores_outcome(store, key)
    return Outcome(
        f"{count - left:,} of {count:,} samples are scored now; {done.summary}; run `weight` again where it was run",
        done.rejected,
    )


def _pending(store: Store, key: str) -> list[AlignedShard]:
    return [shard for shard in aligned_shards(store, [key]) if _count(shard.entries[key])]


def _count(scores: Shard) -> int:
    return sum(scores.counts.get(status, 0) for status in RETRIED)


def _groups(
    store: Store, key: str, shard: AlignedShard, source: PolicySource
) -> Iterator[tuple[pa.Table, Mapping[int, str]]]:
    """The row groups of a shard's scores, those rows of them scored again that have a status of `RETRIED`."""
    held = _held_reasons(store, shard, key)
    columns = {CORPUS: ["input_ids", "loss_mask", *source.corpus_columns], key: SCORES.names[1:]}
    first = 0
    for tables in aligned_row_groups(store, shard, columns):
        corpus, scores = tables[CORPUS], tables[key]
        rows = pc.indices_nonzero(pc.is_in(scores["status"], value_set=pa.array(RETRIED))).to_numpy()
        reasons = {row - first: why for row, why in held.items() if first <= row < first + len(scores)}
        first += len(scores)
        if len(rows):
            batch = token_batch(corpus.take(rows).combine_chunks())
            source.check_batch(batch)
            found = source.score_group(batch, corpus.take(rows), lambda count: None)
            reasons = {row: why for row, why in reasons.items() if row not in set(rows.tolist())}
            reasons |= {int(rows[row]): why for row, why in found.reasons.items()}
            order = np.arange(len(scores))
            order[rows] = len(scores) + np.arange(len(rows))
            scores = pa.concat_tables([scores, score_rows(batch, found)]).take(order).combine_chunks()
        yield scores, reasons


def _held_reasons(store: Store, shard: AlignedShard, key: str) -> dict[int, str]:
    """Why rows of a shard are in its quarantine."""
    entry = shard.entries[key].quarantine
    if entry is None:
        return {}
    held = pq.read_table(store.file(entry), columns=["row", "reason"])
    return dict(zip(held["row"].to_pylist(), held["reason"].to_pylist(), strict=True))
