"""Importance weights of a scored corpus, one sidecar file per shard."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.config import WeightSettings
from pear_data.progress import Outcome, Progress
from pear_data.schema import FLOATS, STATUS_DROPPED, STATUS_OK, STATUS_UNSCORED, WEIGHTS
from pear_data.stages.alignment import AlignedShard, aligned_row_groups, aligned_shards
from pear_data.stages.spans import ALIGNED_BY_BYTES, compared_spans, spanned_policies
from pear_data.store import Store
from pear_data.store.columns import flat_values, list_column
from pear_data.store.manifest import CORPUS, Shard
from pear_data.store.shards import parquet_shard, write_group
from pear_data.weighting import importance_weights, log_ratios

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


def weight(store: Store, settings: WeightSettings, progress: Progress, *, overwrite: bool = False) -> Outcome:
    """Compute one weighting for every shard that lacks it.

    Raises:
        UsageError: a policy is not scored, or its scoring is not finished.
        MismatchError: the weighting exists with other settings, or an artefact changed on disk.
    """
    target, behavior = f"scores/{settings.target}", f"scores/{settings.behavior}"
    key = f"weights/{settings.stored_name}"
    shards = aligned_shards(store, [target, behavior])
    stage = store.begin(key, _stage_settings(store, settings), overwrite=overwrite)
    # Shards are redone below, one by one; until the last is, readers must not take the mixture for finished.
    pending = [s for s in shards if not store.is_current(key, stage.shard(s.name), s.checksums)]
    stage.complete = stage.complete and not pending
    if spanned := spanned_policies(store.manifest, settings.target, settings.behavior):
        stage.decisions[ALIGNED_BY_BYTES] = _approximate(settings, spanned)
        progress.say(f"{key}: {stage.decisions[ALIGNED_BY_BYTES]}")
    progress.begin(key, sum(s.entries[target].num_scored for s in pending), "tokens")
    for shard in pending:
        entry = _weight_shard(store, key, shard, settings, progress)
        store.commit(key, entry)
        progress.shard(shard.name, f"{entry.rows} samples")
    progress.end()
    stage.complete = True
    store.save()
    return _outcome(store, key)


def _stage_settings(store: Store, settings: WeightSettings) -> dict[str, Any]:
    chosen = settings.model_dump(mode="json", exclude={"name"})
    if settings.level != "block":
        del chosen["block_size"]
    if settings.level == "sequence":
        del chosen["gamma"]
    inputs = (CORPUS, f"scores/{settings.target}", f"scores/{settings.behavior}")
    return {**chosen, "inputs": {key: store.stage(key).fingerprint for key in inputs}}


def _approximate(settings: WeightSettings, spanned: list[str]) -> str:
    """What the spans of a foreign tokenizer change in a weighting, for people to read."""
    inside = {
        "token": "a weight takes an even share of its own span's log-ratio for the tokens behind it",
        "block": "a block that would end inside a span ends with the span, so blocks can be longer than asked for",
        "sequence": "sums over a sample are those of the whole text",
    }
    return (
        f"{', '.join(spanned)} reads the text with another tokenizer: log-ratios are exact over spans on which both "
        f"agree and spread evenly inside them, where clips apply per token; {inside[settings.level]}"
    )


def _weight_shard(
    store: Store, key: str, shard: AlignedShard, settings: WeightSettings, progress: Progress
) -> Shard:
    final = store.path / key / f"{shard.name}.parquet"
    target, behavior = f"scores/{settings.target}", f"scores/{settings.behavior}"
    columns = {
        CORPUS: ["label"],
        target: ["logprobs", "span_tokens", "num_scored", "status"],
        behavior: ["logprobs", "span_tokens", "status"],
    }
    statuses: dict[str, int] = {}
    rows = weighted = 0
    with parquet_shard(final, WEIGHTS) as writer:
        for tables in aligned_row_groups(store, shard, columns):
            table = _weight_rows(tables[CORPUS]["label"], tables[target], tables[behavior], settings)
            write_group(writer, table)
            for count in table["status"].value_counts().to_pylist():
                statuses[count["values"]] = statuses.get(count["values"], 0) + count["counts"]
            rows += len(table)
            weighted += _tokens_ok(table)
            progress.advance(_tokens_ok(tables[target]))
    return Shard(
        name=shard.name,
        file=store.entry_of(final),
        rows=rows,
        num_tokens=weighted,
        num_scored=weighted,
        counts=statuses,
        inputs=shard.checksums,
    )


def _weight_rows(
    labels: pa.ChunkedArray, target: pa.Table, behavior: pa.Table, settings: WeightSettings
) -> pa.Table:
    """One row group of weights; rows that a policy could not score get status unscored and no weights."""
    scored = _is_ok(target) & _is_ok(behavior)
    keep = pa.array(scored)
    lengths = target["num_scored"].to_numpy().astype(np.int64)
    target_logprobs = flat_values(target["logprobs"].filter(keep))
    behavior_logprobs = flat_values(behavior["logprobs"].filter(keep))
    spans = compared_spans(target.filter(keep), behavior.filter(keep))
    negative = labels.to_numpy()[scored] < 0
    weights = _weights(target_logprobs, behavior_logprobs, lengths[scored], spans, negative, settings)
    log_ratio = log_ratios(target_logprobs, behavior_logprobs, spans)
    summary = _summary(weights, log_ratio, lengths[scored], settings.clip_log_ratio)

    status = np.full(len(scored), STATUS_UNSCORED, dtype=object)
    status[scored] = np.where(negative & (settings.negative_scale == 0), STATUS_DROPPED, STATUS_OK)
    columns: dict[str, Any] = {
        "sample_id": target["sample_id"],
        "weights": list_column(weights, np.where(scored, lengths, 0), FLOATS, scored),
        "num_scored": target["num_scored"],
        **{name: _scatter(values, scored, WEIGHTS.field(name).type) for name, values in summary.items()},
        "status": pa.array(status, type=pa.string()),
    }
    return pa.table([columns[name] for name in WEIGHTS.names], schema=WEIGHTS)


def _weights(
    target: Floats,
    behavior: Floats,
    lengths: Counts,
    spans: Counts | None,
    negative: npt.NDArray[np.bool_],
    settings: WeightSettings,
) -> Floats:
    """Weights of the scored rows; negatives get their sequence-level weight times -lambda (3.6)."""
    kernel = functools.partial(
        importance_weights,
        block_size=settings.block_size,
        gamma=settings.gamma,
        clip_log_ratio=settings.clip_log_ratio,
        clip_log_weight=settings.clip_log_weight,
    )
    weights = kernel(target, behavior, lengths, level=settings.level, span_lengths=spans)
    if negative.any():
        tokens = np.repeat(negative, lengths)
        negative_spans = None if spans is None else spans[tokens[np.cumsum(spans) - spans]]
        sequence = kernel(
            target[tokens],
            behavior[tokens],
            lengths[negative],
            level="sequence",
            span_lengths=negative_spans,
        )
        weights[tokens] = -settings.negative_scale * sequence if settings.negative_scale else 0.0
    return weights


def _summary(
    weights: Floats, log_ratio: npt.NDArray[np.float64], lengths: Counts, clip_log_ratio: tuple[float, float]
) -> dict[str, npt.NDArray[Any]]:
    """Per-sample summary columns; every length is at least 1."""
    if not len(lengths):
        return {name: np.empty(0) for name in WEIGHTS.names[3:-1]}
    starts = np.cumsum(lengths) - lengths
    total = np.add.reduceat(weights, starts, dtype=np.float64)
    squares = np.add.reduceat(np.square(weights, dtype=np.float64), starts)
    return {
        "log_ratio_sum": np.add.reduceat(log_ratio, starts),
        "weight_mean": total / lengths,
        "weight_min": np.minimum.reduceat(weights, starts),
        "weight_max": np.maximum.reduceat(weights, starts),
        "ess": np.divide(total**2, squares, out=np.zeros_like(total), where=squares > 0),
        "clipped_low": np.add.reduceat(log_ratio < clip_log_ratio[0], starts, dtype=np.int64),
        "clipped_high": np.add.reduceat(log_ratio > clip_log_ratio[1], starts, dtype=np.int64),
    }


def _tokens_ok(table: pa.Table) -> int:
    """Scored tokens of the rows with status ok."""
    return int(table["num_scored"].to_numpy()[_is_ok(table)].sum())


def _is_ok(scores: pa.Table) -> npt.NDArray[np.bool_]:
    return np.asarray(scores["status"].to_numpy(zero_copy_only=False) == STATUS_OK, dtype=np.bool_)


def _scatter(values: npt.NDArray[Any], rows: npt.NDArray[np.bool_], kind: pa.DataType) -> pa.Array:
    """A column with `values` at the true `rows` and nulls elsewhere."""
    column = np.zeros(len(rows), dtype=values.dtype)
    column[rows] = values
    return pa.array(column, mask=~rows).cast(kind)


def _outcome(store: Store, key: str) -> Outcome:
    stage = store.stage(key)
    statuses: dict[str, int] = {}
    for shard in stage.shards:
        for status, count in shard.counts.items():
            statuses[status] = statuses.get(status, 0) + count
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items()))
    summary = f"{key}: {stage.num_scored:,} weighted tokens in {stage.rows:,} samples ({counts})"
    return Outcome(summary, rejected=statuses.get(STATUS_UNSCORED, 0))
