"""Parquet files and Arrow IPC files (what `datasets` saves) as rows, a small batch of decoded bytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_data.corpus.records import MAX_ROW_BYTES, Rejected, Row, rejected
from pear_data.errors import PearError

_BATCH_ROWS = 256
# Columns whose pages hold no more than this are read without expanding their dictionaries, so that one long
# string repeated a million times stays one string until its rows are measured.
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
_FOLDED_BYTES = 16 << 20


def read_parquet(path: Path, skip: int) -> Iterator[Row | Rejected]:
    """The rows of a Parquet file after its first `skip`; row groups before them are not read.

    Raises:
        pa.ArrowException, OSError: the file is damaged.
        PearError: its rows are too large to read, or two columns share a name.
    """
    with pq.ParquetFile(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
    _check_names(path, schema)
    number = 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if number + rows - 1 > skip:
            for start, batch in _group_batches(path, metadata, group):
                yield from _after(skip, number + start, batch)
        number += rows


def read_arrow(path: Path, skip: int) -> Iterator[Row | Rejected]:
    """The rows of an Arrow IPC file or stream after its first `skip`.

    Raises:
        pa.ArrowException, OSError: the file is damaged.
        PearError: two columns share a name.
    """
    number = 1
    with pa.memory_map(str(path)) as source:
        for batch in _ipc_batches(path, source):
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield from _after(skip, number + start, batch.slice(start, _BATCH_ROWS))
            number += batch.num_rows


def _ipc_batches(path: Path, source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        _check_names(path, reader.schema)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        _check_names(path, stream.schema)
        yield from stream


def _check_names(path: Path, schema: pa.Schema) -> None:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise PearError(f"{path} has two columns named {name!r}: rename one")


def _group_batches(path: Path, metadata: pq.FileMetaData, group: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of one row group with the number of rows before each."""
    row_group = metadata.row_group(group)
    columns = [row_group.column(index) for index in range(row_group.num_columns)]
    for column in columns:
        mean = max(column.total_uncompressed_size, column.num_values) / max(1, row_group.num_rows)
        if mean > MAX_ROW_BYTES:
            raise PearError(
                f"{path}: column {column.path_in_schema} of row group {group} holds {mean:,.0f} bytes a row, over the "
                f"limit of {MAX_ROW_BYTES:,}: take these rows out"
            )
    folded = [
        column.path_in_schema
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.total_uncompressed_size <= _FOLDED_BYTES
    ]
    size = sum(column.total_uncompressed_size for column in columns) / max(1, row_group.num_rows)
    rows = max(1, min(_BATCH_ROWS, int(MAX_ROW_BYTES / max(size, 1))))
    with pq.ParquetFile(
        path, metadata=metadata, read_dictionary=folded, pre_buffer=False, buffer_size=1 << 20
    ) as file:
        start = 0
        for batch in file.iter_batches(rows, row_groups=[group], use_threads=False):
            yield start, batch
            start += batch.num_rows


def _after(skip: int, number: int, batch: pa.RecordBatch) -> Iterator[Row | Rejected]:
    """The rows of a batch whose first has this number, less those up to number `skip`."""
    passed = max(0, skip + 1 - number)
    if passed < batch.num_rows:
        yield from _rows(batch.slice(passed), number + passed)


def _rows(batch: pa.RecordBatch, number: int) -> Iterator[Row | Rejected]:
    """Rows of a batch, cut in halves until a part is small enough and decodes; a single row that does not is
    rejected."""
    size = sum(_decoded_bytes(column) for column in batch.columns)
    reason = f"decodes to {size:,} bytes, over the limit of {MAX_ROW_BYTES:,}"
    if size <= MAX_ROW_BYTES:
        try:
            columns = [_values(column) for column in batch.columns]
        except UnicodeDecodeError:
            reason = "holds text that is not UTF-8"
        except (ValueError, OverflowError) as error:
            reason = f"holds a value that cannot be decoded: {str(error).splitlines()[0]}"
        else:
            names = batch.schema.names
            for offset, values in enumerate(zip(*columns, strict=True)):
                fields = {name: value for name, value in zip(names, values, strict=True) if value is not None}
                yield Row(number + offset, fields)
            return
    if batch.num_rows == 1:
        yield rejected(number, reason, b"")
        return
    half = batch.num_rows // 2
    yield from _rows(batch.slice(0, half), number)
    yield from _rows(batch.slice(half), number + half)


def _decoded_bytes(array: pa.Array) -> int:
    """Bytes of an array with its dictionaries expanded."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = _value_bytes(array.dictionary)
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(_decoded_bytes(field) for field in array.flatten())
    if pa.types.is_map(kind):
        return _decoded_bytes(array.keys) + _decoded_bytes(array.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _decoded_bytes(array.flatten())
    return int(array.nbytes)


def _value_bytes(values: pa.Array) -> pa.Array:
    """Bytes of each value of a dictionary."""
    if pa.types.is_nested(values.type) or not _has_length(values.type):
        return pa.array([values.nbytes // max(1, len(values))] * len(values), pa.int64())
    return pc.binary_length(values).cast(pa.int64())


def _has_length(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )


def _values(column: pa.Array) -> list[Any]:
    """A column's values: numpy arrays where it holds lists of numbers, else Python's; fill of structs left out."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        element = kind.value_type
        flat = column.flatten()
        if not flat.null_count and any(test(element) for test in _NUMBERS):
            return _arrays(column, flat)
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.string())  # Python's own have no nanoseconds
    values: list[Any] = column.to_pylist()
    return [_without_fill(value) for value in values] if pa.types.is_nested(kind) else values


def _arrays(column: pa.Array, flat: pa.Array) -> list[Any]:
    lengths = pc.list_value_length(column)
    ends = pc.cumulative_sum(lengths.fill_null(0)).to_pylist()
    values = flat.to_numpy(zero_copy_only=False)
    return [
        None if length is None else values[end - length : end]
        for length, end in zip(lengths.to_pylist(), ends, strict=True)
    ]


def _without_fill(value: Any) -> Any:
    """Leaves out the null keys of structs: Arrow fills in what other rows have and this one has not."""
    if isinstance(value, dict):
        return {key: _without_fill(item) for key, item in value.items() if item is not None}
    return [_without_fill(item) for item in value] if isinstance(value, list) else value
