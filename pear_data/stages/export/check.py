"""Reading an export again: does every row hold what its format promises?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pear_data.store.columns import IntArray, flat_values, list_lengths, offsets_of

IGNORED_LABEL = -100

Places = npt.NDArray[np.bool_]

_PER_TOKEN = {"labels", "loss_weights", "attention_mask", "position_ids", "behavior_logprobs"}


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
    for what, rows in _wrong_rows(table, lengths, max_length):
        if (bad := np.flatnonzero(rows)).size:
            return f"{_row_name(table, int(bad[0]))}: {what}"
    # From here on packs are taken as the samples in them.
    packed = "seq_lengths" in table.column_names
    names = table["sample_ids"].combine_chunks().flatten() if packed else table["sample_id"]
    offsets = offsets_of(flat_values(table["seq_lengths"]).astype(np.int64) if packed else lengths)
    for what, tokens in _wrong_tokens(table, offsets):
        if (bad := np.flatnonzero(tokens)).size:
            sample = int(np.searchsorted(offsets, bad[0], side="right")) - 1
            return f"sample {names[sample].as_py()!r}: {what}, at index {int(bad[0] - offsets[sample])}"
    return None


def _wrong_rows(table: pa.Table, lengths: IntArray, max_length: int | None) -> Iterator[tuple[str, Places]]:
    """What can be wrong with whole rows, and those where it is."""
    if max_length is not None:
        yield f"more tokens than the {max_length} of max_length", lengths > max_length
    for name in table.column_names:
        if name in _PER_TOKEN:
            yield f"not as many {name} as input_ids", list_lengths(table[name]) != lengths
    if "seq_lengths" in table.column_names:
        counts = list_lengths(table["seq_lengths"])
        yield "not as many sample_ids as seq_lengths", list_lengths(table["sample_ids"]) != counts
        of_samples = flat_values(table["seq_lengths"]).astype(np.int64)
        packs = np.repeat(np.arange(len(counts)), counts)
        sums = np.bincount(packs, of_samples, len(counts))
        shortest = np.bincount(packs, of_samples < 1, len(counts))
        yield "seq_lengths do not sum to the pack's tokens", (sums != lengths) | (shortest > 0)


def _wrong_tokens(table: pa.Table, offsets: IntArray) -> Iterator[tuple[str, Places]]:
    """What can be wrong with single tokens, and those where it is; samples begin at `offsets`."""
    ids, weights = flat_values(table["input_ids"]), flat_values(table["loss_weights"])
    first = np.zeros(len(ids), dtype=np.bool_)
    first[offsets[:-1][np.diff(offsets) > 0]] = True
    yield "a weight is not finite", ~np.isfinite(weights)
    yield "an id is negative", ids < 0
    yield "the first token of a sample has a weight, though nothing predicts it", first & (weights != 0)
    if "position_ids" in table.column_names:
        counted = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
        yield "position_ids do not count from 0", flat_values(table["position_ids"]) != counted
    if "labels" in table.column_names:
        labels = flat_values(table["labels"])
        ignored = labels == IGNORED_LABEL
        yield "a label is neither -100 nor its token", ~ignored & (labels != ids)
        yield "there is a weight where the label is -100", ignored & (weights != 0)
        yield "the first token of a sample has a label", first & ~ignored
        if "behavior_logprobs" in table.column_names:
            behavior = flat_values(table["behavior_logprobs"])
            yield "a behavior log-prob is no number", ~np.isfinite(behavior)
            yield "there is a behavior log-prob where the label is -100", ignored & (behavior != 0)


def _row_name(table: pa.Table, row: int) -> str:
    if "sample_id" in table.column_names:
        return f"sample {table['sample_id'][row].as_py()!r}"
    return f"the pack of {', '.join(map(repr, table['sample_ids'][row].as_py()[:3]))}"
