"""Reading an export again: does every row hold what its format promises?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pear_data.store.columns import flat_values, list_lengths, offsets_of

IGNORED_LABEL = -100

Places = npt.NDArray[np.bool_]


def table_fault(path: Path, schema: pa.Schema, max_length: int | None) -> str | None:
    """The first thing wrong in a Parquet file of an export, with the row's name, or None.

    No row may have more than `max_length` tokens.
    """
    try:
        with pq.ParquetFile(path) as parquet:
            if not parquet.schema_arrow.equals(schema):
                return f"has columns {parquet.schema_arrow.names} of other types or names than {schema.names}"
            for group in range(parquet.num_row_groups):
                if fault := _group_fault(parquet.read_row_group(group), max_length):
                    return fault
    except (pa.ArrowException, OSError) as error:
        return f"cannot be read ({error})"
    return None


def weights_fault(name: str, weights: npt.NDArray[np.float64], tokens: int) -> str | None:
    """What is wrong with one row's weights, for formats that are read row by row."""
    if len(weights) != tokens:
        return f"{name}: {len(weights)} weights for {tokens} tokens"
    if not np.isfinite(weights).all():
        return f"{name}: a weight is not finite"
    if (weights.astype(np.float32) != weights).any():
        return f"{name}: a weight is no float32, so the trainer would cast it"
    return None


def _group_fault(table: pa.Table, max_length: int | None) -> str | None:
    lengths = list_lengths(table["input_ids"])
    if max_length is not None and (bad := np.flatnonzero(lengths > max_length)).size:
        row = int(bad[0])
        return f"{_name(table, row)}: {int(lengths[row])} tokens, more than the {max_length} of max_length"
    per_token = {"input_ids", "labels", "loss_weights", "attention_mask", "position_ids", "behavior_logprobs"}
    for name in sorted(per_token & set(table.column_names)):
        if (bad := np.flatnonzero(list_lengths(table[name]) != lengths)).size:
            row = int(bad[0])
            other = int(list_lengths(table[name])[row])
            return f"{_name(table, row)}: {other} {name} for {int(lengths[row])} input_ids"
    offsets = offsets_of(lengths)
    for what, places in _wrong_places(table, lengths, offsets):
        if (bad := np.flatnonzero(places)).size:
            row = int(np.searchsorted(offsets, bad[0], side="right")) - 1
            return f"{_name(table, row)}: {what}, at index {int(bad[0] - offsets[row])}"
    return None


def _wrong_places(
    table: pa.Table, lengths: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]
) -> Iterator[tuple[str, Places]]:
    """What can be wrong, and the tokens where it is."""
    ids, weights = flat_values(table["input_ids"]), flat_values(table["loss_weights"])
    first = np.zeros(len(ids), dtype=np.bool_)
    first[offsets[:-1][lengths > 0]] = True
    yield "a weight is not finite", ~np.isfinite(weights)
    yield "an id is negative", ids < 0
    if "position_ids" in table.column_names:
        starts = _sequence_starts(table, lengths)
        if starts is None:
            yield "seq_lengths do not sum to the pack's tokens", first
            return
        begin = np.maximum.accumulate(np.where(starts, np.arange(len(ids)), 0))
        positions = flat_values(table["position_ids"])
        yield "position_ids do not count each sample from 0", positions != np.arange(len(ids)) - begin
        first = starts
    yield "the first token of a sample has a weight, though nothing predicts it", first & (weights != 0)
    if "labels" in table.column_names:
        labels = flat_values(table["labels"])
        yield "a label is neither -100 nor its token", (labels != IGNORED_LABEL) & (labels != ids)
        yield "there is a weight where the label is -100", (labels == IGNORED_LABEL) & (weights != 0)
        yield "the first token of a sample has a label", first & (labels != IGNORED_LABEL)
    if "behavior_logprobs" in table.column_names:
        behavior = flat_values(table["behavior_logprobs"])
        yield "a behavior log-prob is no number", ~np.isfinite(behavior)
        yield (
            "there is a behavior log-prob where the label is -100",
            (labels == IGNORED_LABEL) & (behavior != 0),
        )


def _sequence_starts(table: pa.Table, lengths: npt.NDArray[np.int64]) -> Places | None:
    of_samples = flat_values(table["seq_lengths"]).astype(np.int64)
    per_pack = list_lengths(table["seq_lengths"])
    packs = np.repeat(np.arange(len(per_pack)), per_pack)
    if (of_samples < 1).any() or (np.bincount(packs, of_samples, len(per_pack)) != lengths).any():
        return None
    starts = np.zeros(int(lengths.sum()), dtype=np.bool_)
    starts[np.cumsum(of_samples) - of_samples] = True
    return starts


def _name(table: pa.Table, row: int) -> str:
    if "sample_id" in table.column_names:
        return f"sample {table['sample_id'][row].as_py()!r}"
    return f"the pack of {', '.join(map(repr, table['sample_ids'][row].as_py()[:3]))}"
