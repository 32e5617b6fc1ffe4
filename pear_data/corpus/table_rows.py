"""Batches of a table as rows: each measured before it is decoded, so that none becomes more than its bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pear_data.corpus.records import MAX_ROW_BYTES, Rejected, Row, rejected, to_json

_PLAIN = (
    (pa.types.is_string, pa.binary()),
    (pa.types.is_large_string, pa.large_binary()),
    (pa.types.is_string_view, pa.binary_view()),
)
# Lists of these become numpy arrays, never Python objects.
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)


def rows_behind(skip: int, number: int, batch: pa.RecordBatch) -> Iterator[Row | Rejected]:
    """The rows of a batch whose first has this number, less those up to number `skip`."""
    passed = max(0, skip + 1 - number)
    if passed < batch.num_rows:
        yield from _rows(batch.slice(passed), number + passed)


def _rows(batch: pa.RecordBatch, number: int) -> Iterator[Row | Rejected]:
    """Rows of a batch, cut in halves until a part is small enough and decodes; a single row that does not is
    rejected."""
    size = sum(_decoded_bytes(column) for column in batch.columns)
    reason, raw = f"decodes to {size:,} bytes, over the limit of {MAX_ROW_BYTES:,}", b""
    if size <= MAX_ROW_BYTES:
        try:
            yield from _decoded(batch, number)
            return
        except UnicodeDecodeError:
            reason = "holds text that is not UTF-8"
        except (ValueError, OverflowError) as error:
            reason = f"holds a value that cannot be decoded: {str(error).splitlines()[0]}"
        raw = _undecoded(batch) if batch.num_rows == 1 else b""
    if batch.num_rows == 1:
        yield rejected(number, reason, raw)
        return
    half = batch.num_rows // 2
    yield from _rows(batch.slice(0, half), number)
    yield from _rows(batch.slice(half), number + half)


def _decoded(batch: pa.RecordBatch, number: int) -> list[Row]:
    columns = [_values(column) for column in batch.columns]
    names = batch.schema.names
    if not names:  # such a batch still has rows
        return [Row(number + offset, {}) for offset in range(batch.num_rows)]
    return [
        Row(
            number + offset,
            {name: value for name, value in zip(names, row, strict=True) if value is not None},
        )
        for offset, row in enumerate(zip(*columns, strict=True))
    ]


def _undecoded(row: pa.RecordBatch) -> bytes:
    """A row that does not decode, as JSON: its text as bytes in hex, without the columns that are worse."""
    values = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            (value,) = _values(column)
        except UnicodeDecodeError:
            (value,) = column.view(text_as_bytes(column.type)).to_pylist()
        except (ValueError, OverflowError):
            continue
        values[name] = value
    return to_json(values).encode()


def text_as_bytes(kind: pa.DataType) -> pa.DataType:
    """A type of the same layout in which no text is promised to be UTF-8."""
    for is_text, plain in _PLAIN:
        if is_text(kind):
            return plain
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, text_as_bytes(kind.value_type), kind.ordered)
    if pa.types.is_map(kind):
        return pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field))
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    return kind


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(text_as_bytes(field.type))


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
