"""Whether a shard's summary and totals say what its part holds: every row, every sum, in the memory of a row group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_data.schema import (
    CORPUS_SUMMARY,
    STATUS_DROPPED,
    STATUS_OK,
    STATUS_UNSCORED,
    WEIGHT_SUMMARY,
    WEIGHT_TOTALS,
)
from pear_data.store import Store
from pear_data.store.columns import flat_values, list_lengths, offsets_of
from pear_data.store.manifest import FileEntry, Shard

BATCH_ROWS = 1 << 16
# Weights are float32, and what they were rounded from may have been summed.
ROUNDING = 1e-6
# Two orders of the same sums in float64.
ORDER = 1e-9

_STATUSES = {"ok": STATUS_OK, "unscored": STATUS_UNSCORED, "dropped": STATUS_DROPPED}
_ROW_COUNTS = ("samples", "negatives", *_STATUSES)
_TOKEN_COUNTS = ("clipped_low", "clipped_high", "saturated_low", "saturated_high")
_WEIGHT_SUMS = ("weight_sum", "weight_square_sum")


class _Rows:
    """The rows of a Parquet file, taken as many at a time as asked."""

    def __init__(self, path: Path, columns: list[str] | None = None) -> None:
        parquet = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        self.schema = parquet.schema_arrow
        self._batches = parquet.iter_batches(BATCH_ROWS, columns=columns)
        self._left = self.schema.empty_table().select(columns or self.schema.names)

    def take(self, rows: int) -> pa.Table:
        """The next rows; fewer at the end."""
        while len(self._left) < rows and (batch := next(self._batches, None)) is not None:
            self._left = pa.concat_tables([self._left, pa.Table.from_batches([batch])])
        taken, self._left = self._left.slice(0, rows), self._left.slice(rows)
        return taken


def corpus_summary_faults(store: Store, shard: Shard, summary: FileEntry) -> Iterator[str]:
    """Faults of a corpus shard's summary; both files are as the manifest has them."""
    rows = _Rows(store.path / summary.path)
    names = CORPUS_SUMMARY.names
    if rows.schema != CORPUS_SUMMARY:
        yield "has another schema than summaries of the corpus have"
    elif not all(
        table.select(names).equals(rows.take(len(table))) for table in store.row_groups(shard, names)
    ) or len(rows.take(1)):
        yield f"rows are not those of {shard.file.path}"


def weight_summary_faults(store: Store, shard: Shard, summary: FileEntry) -> Iterator[str]:
    """Faults of a weighting's summary; both files are as the manifest has them."""
    rows = _Rows(store.path / summary.path)
    if rows.schema != WEIGHT_SUMMARY:
        yield "has another schema than summaries of weights have"
    else:
        yield from _unequal_sums(store, shard, rows)


def _unequal_sums(store: Store, shard: Shard, rows: _Rows) -> Iterator[str]:
    for part in store.row_groups(shard):
        summary = rows.take(len(part))
        common = ["sample_id", "num_scored", "status"]
        if not part.select(common).equals(summary.select(common)):
            yield f"rows are not those of {shard.file.path}"
            return
        for name, values in _sums(part["weights"]).items():
            found = summary[name].to_numpy().astype(np.float64)
            if not np.allclose(found, values, rtol=ROUNDING, atol=0, equal_nan=True):
                yield f"{name} is not that of the weights in {shard.file.path}"
    if len(rows.take(1)):
        yield f"rows are not those of {shard.file.path}"


def _sums(weights: pa.ChunkedArray) -> dict[str, npt.NDArray[np.float64]]:
    """Sums and extremes of each row's weights; NaN where there are none."""
    flat, lengths = flat_values(weights).astype(np.float64), list_lengths(weights)
    filled = lengths > 0
    starts = offsets_of(lengths)[:-1][filled]
    wanted: dict[str, tuple[np.ufunc, npt.NDArray[np.float64]]] = {
        "weight_sum": (np.add, flat),
        "weight_square_sum": (np.add, flat**2),
        "weight_min": (np.minimum, flat),
        "weight_max": (np.maximum, flat),
    }
    sums = {}
    for name, (ufunc, values) in wanted.items():
        sums[name] = np.full(len(lengths), np.nan)
        if len(starts):
            sums[name][filled] = ufunc.reduceat(values, starts)
    return sums


def totals_faults(store: Store, corpus: FileEntry, summary: FileEntry, totals: FileEntry) -> Iterator[str]:
    """Faults of a weighting's totals, held against its summary; `corpus` has the samples' sources and labels.

    All files are as the manifest has them.
    """
    table = pq.read_table(store.path / totals.path)
    if table.schema != WEIGHT_TOTALS:
        yield "has another schema than totals have"
        return
    expected = _summed_up(store, corpus, summary)
    found = {row["source"]: row for row in table.to_pylist()}
    if expected is None or len(found) != len(table) or found.keys() != expected.keys():
        yield f"samples or sources are not those of {corpus.path}"
        return
    wrong = {name for source, row in expected.items() for name in _differing(found[source], row)}
    for name in sorted(wrong):
        yield f"{name} does not add up to what {summary.path} holds"


def _summed_up(store: Store, corpus: FileEntry, summary: FileEntry) -> dict[str, dict[str, float]] | None:
    """What the totals of each source must be, from the samples' sums; None where the samples are not the corpus's."""
    sources = _Rows(store.path / corpus.path, ["sample_id", "source", "label"])
    rows = _Rows(store.path / summary.path)
    expected: dict[str, dict[str, float]] = {}
    while len(batch := rows.take(BATCH_ROWS)):
        corpus_rows = sources.take(len(batch))
        if not corpus_rows["sample_id"].equals(batch["sample_id"]):
            return None
        encoded = corpus_rows["source"].combine_chunks().dictionary_encode()
        codes, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        for quantity, values in _contributions(batch, corpus_rows["label"].to_numpy()).items():
            sums = np.bincount(codes, weights=values, minlength=len(names))
            for name, value in zip(names, sums.tolist(), strict=True):
                row = expected.setdefault(name, {})
                row[quantity] = row.get(quantity, 0) + value
    return expected


def _contributions(summary: pa.Table, label: npt.NDArray[np.int8]) -> dict[str, npt.NDArray[Any]]:
    """What each sample adds to the totals of its source."""
    status = summary["status"].to_numpy(zero_copy_only=False)
    used = (label > 0) & (status == STATUS_OK)
    added = {"samples": used, "negatives": label < 0}
    added |= {name: status == value for name, value in _STATUSES.items()}
    sums = {name: pc.fill_null(summary[name], 0).to_numpy() for name in (*_TOKEN_COUNTS, *_WEIGHT_SUMS)}
    sums["tokens"] = summary["num_scored"].to_numpy()
    return {**added, **{name: np.where(used, values, 0) for name, values in sums.items()}}


def _differing(found: dict[str, Any], expected: dict[str, float]) -> Iterator[str]:
    """The columns of a source's totals that are not as expected."""
    for name, value in expected.items():
        total = found[name] if name in _ROW_COUNTS else sum(found[name])
        if not math.isclose(total, value, rel_tol=ORDER, abs_tol=0):
            yield name
    for quantity, name in (("weight", "tokens"), ("sample_weight", "samples"), ("log_ratio", "tokens")):
        counted = sum(found[f"{quantity}_counts"])
        # Where one policy only is known there are no log-ratios.
        if counted != expected[name] and (quantity != "log_ratio" or counted):
            yield f"{quantity}_counts"
