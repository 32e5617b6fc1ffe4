"""Parquet files and Arrow IPC files (what `datasets` saves) as rows, a small batch of decoded bytes at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pear_data.corpus.bounded_memory import bounded_memory
from pear_data.corpus.records import MAX_ROW_BYTES, Rejected, Row, shown
from pear_data.corpus.table_rows import rows_behind, text_as_bytes
from pear_data.errors import PearError

_BATCH_ROWS = 256
# In row groups that claim no more than this, text is read without expanding its dictionaries, so that one long string
# repeated a million times stays one string until its rows are measured.
_FOLDED_BYTES = 16 << 20


def read_parquet(path: Path, skip: int) -> Iterator[Row | Rejected]:
    """The rows of a Parquet file after its first `skip`; row groups before them are not read.

    Raises:
        pa.ArrowException, OSError: the file is damaged.
        MemoryError: a piece of it decodes to more than `bounded_memory` allows.
        PearError: its rows are too large to read, or two columns share a name.
    """
    with bounded_memory(), pq.ParquetFile(path) as file:
        metadata, schema, texts = file.metadata, file.schema_arrow, _text_columns(file)
    _check_names(path, schema)
    number = 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if number + rows - 1 > skip:
            for start, batch in _group_batches(path, metadata, group, texts):
                yield from rows_behind(skip, number + start, batch)
        number += rows


def read_arrow(path: Path, skip: int) -> Iterator[Row | Rejected]:
    """The rows of an Arrow IPC file or stream after its first `skip`.

    Raises:
        pa.ArrowException, OSError: the file is damaged.
        MemoryError: a piece of it decodes to more than `bounded_memory` allows.
        PearError: two columns share a name.
    """
    number = 1
    with pa.memory_map(str(path)) as source:
        for batch in _ipc_batches(path, source):
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield from rows_behind(skip, number + start, batch.slice(start, _BATCH_ROWS))
            number += batch.num_rows


def _ipc_batches(path: Path, source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    with bounded_memory():
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            schema = file.schema
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            source.seek(0)
            stream = pa.ipc.open_stream(source)
            schema = stream.schema
            batches = iter(stream)
    _check_names(path, schema)
    while (batch := _next_batch(batches)) is not None:
        yield batch


def _next_batch(batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    """The next batch; Arrow trusts offsets, and would follow a hostile one out of its memory."""
    with bounded_memory():
        batch = next(batches, None)
        if batch is None:
            return None
        return pa.RecordBatch.from_arrays(list(map(_checked, _columns(batch))), names=batch.schema.names)


def _columns(batch: pa.RecordBatch) -> list[pa.Array]:
    try:
        columns: list[pa.Array] = batch.columns
    except KeyError:
        raise pa.ArrowNotImplementedError("a column is of a type that pyarrow does not know") from None
    return columns


def _checked(column: pa.Array) -> pa.Array:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        # Text that is not UTF-8 costs its row alone. What was checked is the view, so that goes on.
        view = column.view(text_as_bytes(column.type))
        view.validate(full=True)
        return view.view(column.type)
    return column


def _check_names(path: Path, schema: pa.Schema) -> None:
    name, count = Counter(schema.names).most_common(1)[0] if schema.names else ("", 0)
    if count > 1:
        raise PearError(f"{path} has two columns named {shown(name)}: rename one")


def _text_columns(file: pq.ParquetFile) -> list[str]:
    columns = [file.schema.column(index) for index in range(file.metadata.num_columns)]
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _group_batches(
    path: Path, metadata: pq.FileMetaData, group: int, folded: list[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of one row group with the number of rows before each."""
    # Not its columns' metadata: damaged, they end the process.
    row_group = metadata.row_group(group)
    mean = row_group.total_byte_size / max(1, row_group.num_rows)
    if mean > MAX_ROW_BYTES:
        raise PearError(
            f"{path}: row group {group} holds {mean:,.0f} bytes a row, over the limit of {MAX_ROW_BYTES:,}: take these "
            "rows out"
        )
    if row_group.total_byte_size > _FOLDED_BYTES:
        folded = []
    rows = max(1, min(_BATCH_ROWS, int(MAX_ROW_BYTES / max(mean, 1))))
    with pq.ParquetFile(
        path, metadata=metadata, read_dictionary=folded, pre_buffer=False, buffer_size=1 << 20
    ) as file:
        start = 0
        batches = file.iter_batches(rows, row_groups=[group], use_threads=False)
        while (batch := _next_decoded(batches)) is not None:
            yield start, batch
            start += batch.num_rows
    if start != row_group.num_rows:
        raise pa.ArrowInvalid(
            f"row group {group} has {start} rows where its metadata says {row_group.num_rows}"
        )


def _next_decoded(batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    with bounded_memory():
        return next(batches, None)
