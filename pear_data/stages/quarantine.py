"""What a store set aside: rows rejected at ingest, samples that a policy could not score, each with its reason."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_data.errors import UsageError
from pear_data.stages.sql import Format, write_rows
from pear_data.store import Store
from pear_data.store.manifest import CORPUS, FileEntry, Shard

Place = tuple[str, int]  # an input's name and the number of a row in it
BATCH_ROWS = 1024

_FOUND = [
    pa.field("stage", pa.string(), nullable=False),
    pa.field("input", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("sample_id", pa.string()),
    pa.field("reason", pa.string(), nullable=False),
]
LISTED = pa.schema([*_FOUND, pa.field("raw", pa.binary(), nullable=False)])
# Text formats have no bytes: what is not UTF-8 stands in a column of its own.
_AS_TEXT = pa.schema([*_FOUND, pa.field("raw", pa.string()), pa.field("raw_base64", pa.string())])
_AS_TABLE = pa.schema([*_FOUND, pa.field("raw", pa.string())])


def write_quarantine(store: Store, form: Format, sink: BinaryIO, *, stage: str | None = None) -> str:
    """Write the rows in quarantine, those of one `stage` or all, to `sink`, a batch at a time.

    A corpus's rows that were mended since are left out. `row` counts from 1.

    Returns:
        How many there are, by stage, for people.

    Raises:
        UsageError: the store has no such stage.
        MismatchError: a file is gone or damaged.
    """
    if stage is not None and stage not in store.manifest.stages:
        raise UsageError(
            f"{store.path} has no {stage}: it has {', '.join(store.manifest.stages) or 'nothing'}"
        )
    keys = list(store.manifest.stages) if stage is None else [stage]
    shape, schema = _SHAPES.get(form, (_as_text, _AS_TEXT))

    note = write_rows(schema, (shape(batch) for key in keys for batch in _stage_rows(store, key)), form, sink)
    counts = {key: count for key in keys if (count := store.manifest.stages[key].quarantined)}
    of_each = ", ".join(f"{count:,} of {key}" for key, count in counts.items())
    total = f"{sum(counts.values()):,} rows in quarantine" + (f": {of_each}" if of_each else "")
    return f"{note}\n{total}" if note else total


def quarantined_places(store: Store) -> set[Place]:
    """Where the rows stood that ingest rejected."""
    return _places(store, [shard.quarantine for shard in store.stage(CORPUS).shards])


def mended_places(store: Store) -> set[Place]:
    """Those of them that are, mended, in the corpus."""
    return _places(store, [shard.mended for shard in store.stage(CORPUS).shards])


def _places(store: Store, files: list[FileEntry | None]) -> set[Place]:
    found: set[Place] = set()
    for entry in files:
        if entry is not None:
            table = pq.read_table(store.file(entry), columns=["input", "row"])
            found.update(zip(table["input"].to_pylist(), table["row"].to_pylist(), strict=True))
    return found


def _stage_rows(store: Store, key: str) -> Iterator[pa.RecordBatch]:
    """Rows of a stage's quarantine, shape `LISTED`."""
    mended = mended_places(store) if key == CORPUS else set()
    for shard in store.stage(key).shards:
        if shard.quarantine is None:
            continue
        ids = None if key == CORPUS else _sample_ids(store, shard)
        with pq.ParquetFile(store.file(shard.quarantine), pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
                found = _listed(key, batch, ids)
                if mended:
                    places = zip(found["input"].to_pylist(), found["row"].to_pylist(), strict=True)
                    found = found.filter(pa.array([place not in mended for place in places], pa.bool_()))
                yield found


def _listed(key: str, batch: pa.RecordBatch, ids: pa.ChunkedArray | None) -> pa.RecordBatch:
    rows = batch["row"]
    if ids is None:
        sample_ids = pa.nulls(len(batch), pa.string())
    else:
        sample_ids = ids.take(rows).combine_chunks()
        rows = pc.add(rows, 1)  # scoring counts a shard's rows from 0
    columns = [
        pa.array([key] * len(batch), pa.string()),
        batch["input"],
        rows,
        sample_ids,
        batch["reason"],
        batch["raw"],
    ]
    return pa.RecordBatch.from_arrays(columns, schema=LISTED)


def _sample_ids(store: Store, shard: Shard) -> pa.ChunkedArray:
    path: Path = store.file(shard.file)
    return pq.read_table(path, columns=["sample_id"])["sample_id"]


def _as_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    texts: list[str | None] = []
    encoded: list[str | None] = []
    for raw in batch["raw"].to_pylist():
        try:
            texts.append(raw.decode())
            encoded.append(None)
        except UnicodeDecodeError:
            texts.append(None)
            encoded.append(base64.b64encode(raw).decode())
    columns = [*batch.columns[:-1], pa.array(texts, pa.string()), pa.array(encoded, pa.string())]
    return pa.RecordBatch.from_arrays(columns, schema=_AS_TEXT)


def _as_table(batch: pa.RecordBatch) -> pa.RecordBatch:
    texts = [raw.decode(errors="backslashreplace") for raw in batch["raw"].to_pylist()]
    return pa.RecordBatch.from_arrays([*batch.columns[:-1], pa.array(texts, pa.string())], schema=_AS_TABLE)


def _as_it_is(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch


_SHAPES = {"table": (_as_table, _AS_TABLE), "parquet": (_as_it_is, LISTED)}
