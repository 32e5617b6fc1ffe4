"""Pieces of SQL text."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

_TYPES = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.bool_(): "BOOLEAN",
    pa.int8(): "TINYINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
}


def quoted(identifier: str) -> str:
    """An SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


def literal(text: str) -> str:
    """An SQL string."""
    return "'" + text.replace("'", "''") + "'"


def type_name(kind: pa.DataType) -> str:
    """DuckDB's name of an Arrow type."""
    return f"{_TYPES[kind.value_type]}[]" if pa.types.is_list(kind) else _TYPES[kind]


def no_rows(schema: pa.Schema) -> str:
    """A query with the columns of `schema` and no row."""
    columns = ", ".join(f"NULL::{type_name(field.type)} AS {field.name}" for field in schema)
    return f"SELECT {columns}\nWHERE false"


def select(columns: Iterable[str], rest: str) -> str:
    """A query, one column a line; `rest` begins with FROM."""
    listed = ",\n  ".join(columns)
    return f"SELECT\n  {listed}\n{rest}"


def from_query(inner: str, alias: str) -> str:
    """FROM a query in brackets."""
    indented = inner.replace("\n", "\n  ")
    return f"FROM (\n  {indented}\n) AS {alias}"
