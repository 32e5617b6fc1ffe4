"""The result of a query over a store, written batch by batch as a table, JSON, CSV or Parquet."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pear_data.errors import PearError, UsageError
from pear_data.stages.alignment import outdated
from pear_data.stages.text import one_line
from pear_data.store import Store
from pear_data.store.memory_bound import memory_bound
from pear_data.store.shown import left_out
from pear_data.store.views import connect

Format = Literal["table", "json", "jsonl", "csv", "parquet"]

# One DuckDB vector: the least it hands over, and little even where every row holds a list of 100,000 floats.
BATCH_ROWS = 2048
# A table is for looking at; the other formats hold everything.
TABLE_ROWS = 500
CELL_CHARACTERS = 200
# A table that goes to a file or a pipe is as wide as its cells.
UNLIMITED_WIDTH = 100_000
# What is turned into text at once; text takes several times as much.
PIECE_BYTES = 64 << 20
ROW_BYTES = 256 << 20
WRITING_BYTES = 1 << 30

Batches = Iterator[pa.RecordBatch]


def write_query(
    store: Store,
    query: str,
    form: Format,
    sink: BinaryIO,
    *,
    timeout: float | None = None,
    memory: int | None = None,
) -> str | None:
    """Run a read-only query over the store's views and write its rows to `sink`.

    DuckDB's buffers take at most `memory` bytes (by default 80 % of what the process may have) and spill to disk. With
    what its functions make, and the batch that is written, the process takes at most a quarter more and WRITING_BYTES:
    meanwhile allocations beyond that fail in all of it. JSON has no NaN or infinity: they become null. In CSV, lists
    and structs become JSON.

    Returns:
        A note for people where not everything is shown (a table of more than TABLE_ROWS rows, a weighting without
        summaries), or where a stage was made from something else than the store holds now.

    Raises:
        UsageError: the query does more than read, or its columns do not fit the format.
        MismatchError: a committed file is missing or has another size.
        PearError: DuckDB refuses the query, or it runs longer than `timeout` seconds, or a row of its result is huge.
        StuckError: it does not end although it was stopped; the process must.
    """
    notes = [fault for key in store.manifest.stages if (fault := outdated(store, key))]
    notes += [
        f"weights/{name} in {store.path} is left out, as an earlier version made it without summaries: "
        f"run `pear-data migrate --store {store.path}`"
        for name in left_out(store.manifest)
    ]
    with (
        connect(store, timeout=timeout, memory=memory) as views,
        memory_bound(views.memory_limit * 5 // 4 + WRITING_BYTES),
    ):
        schema, batches = views.batches(query, BATCH_ROWS)
        if cut := write_rows(schema, _cut(batches), form, sink):
            notes.append(cut)
    return "\n".join(notes) or None


def write_rows(schema: pa.Schema, batches: Batches, form: Format, sink: BinaryIO) -> str | None:
    """Write rows to `sink`, a batch at a time; the note for people where a table holds not all of them.

    Raises:
        UsageError: the columns do not fit the format.
    """
    if form != "table":
        _check_names(schema)
    if form not in ("table", "parquet"):
        _check_text_columns(schema)
    writer: dict[str, Callable[[pa.Schema, Batches, BinaryIO], str | None]] = {
        "table": _write_table,
        "json": _write_json,
        "jsonl": _write_jsonl,
        "csv": _write_csv,
        "parquet": _write_parquet,
    }
    return writer[form](schema, batches, sink)


def _cut(batches: Batches) -> Batches:
    """Batches of few enough rows to be written without much memory.

    Raises:
        PearError: one row is too much.
    """
    for batch in batches:
        rows = max(1, len(batch) * PIECE_BYTES // max(1, batch.nbytes))
        for start in range(0, len(batch), rows):
            piece = batch.slice(start, rows)
            if len(piece) == 1 and piece.nbytes > ROW_BYTES:
                raise PearError(
                    f"a row of the result takes {piece.nbytes:,} bytes, more than {ROW_BYTES:,}: select less of it"
                )
            yield piece


def _write_jsonl(schema: pa.Schema, batches: Batches, sink: BinaryIO) -> None:
    for batch in batches:
        sink.write(_lines(batch))


def _write_json(schema: pa.Schema, batches: Batches, sink: BinaryIO) -> None:
    separator = b"[\n"
    for batch in batches:
        if rows := _lines(batch).rstrip(b"\n"):
            sink.write(separator + rows.replace(b"\n", b",\n"))
            separator = b",\n"
    sink.write(b"[]\n" if separator == b"[\n" else b"\n]\n")


def _write_csv(schema: pa.Schema, batches: Batches, sink: BinaryIO) -> None:
    header = True
    for batch in itertools.chain([schema.empty_table()], batches):
        frame = _plain_numbers(batch)
        nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
        text = frame.with_columns(_as_json(name) for name in nested).write_csv(include_header=header)
        sink.write(text.encode())
        header = False


def _lines(batch: pa.RecordBatch) -> bytes:
    # Not straight into the sink: polars turns a closed pipe into an error that no one can tell from others.
    buffer = io.BytesIO()
    _plain_numbers(batch).write_ndjson(buffer)
    return buffer.getvalue()


def _write_parquet(schema: pa.Schema, batches: Batches, sink: BinaryIO) -> None:
    try:
        writer = pq.ParquetWriter(sink, schema, compression="zstd", compression_level=1)
    except pa.ArrowNotImplementedError as error:
        raise UsageError(f"a column is of a type Parquet lacks ({error}): cast it in the query") from None
    with writer:
        for batch in batches:
            writer.write_batch(batch)


def _write_table(schema: pa.Schema, batches: Batches, sink: BinaryIO) -> str | None:
    table = Table(header_style="bold")
    for field in schema:
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        table.add_column(one_line(field.name), justify="right" if numeric else "left", overflow="fold")
    more = False
    for batch in batches:
        room = TABLE_ROWS - table.row_count
        # By column, as two of them may have one name.
        for row in zip(*(column.to_pylist() for column in batch.slice(0, room).columns), strict=True):
            table.add_row(*map(_cell, row))
        if len(batch) > room:
            more = True
            break
    terminal = sink.isatty()
    text = io.TextIOWrapper(sink, encoding="utf-8", errors="replace", write_through=True)
    console = Console(
        file=text,
        markup=False,
        highlight=False,
        emoji=False,
        width=None if terminal else UNLIMITED_WIDTH,
    )
    console.print(table)
    # Closing the wrapper would close the sink, which is the caller's.
    text.detach()
    return f"first {TABLE_ROWS} rows; --format csv, json, jsonl or parquet give all" if more else None


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "" if value is None else one_line(str(value))
    return text if len(text) <= CELL_CHARACTERS else f"{text[: CELL_CHARACTERS - 1]}…"


def _check_names(schema: pa.Schema) -> None:
    repeated = [name for name, count in Counter(schema.names).items() if count > 1]
    if repeated:
        raise UsageError(f"two columns are called {repeated[0]!r}: rename one with AS")


def _check_text_columns(schema: pa.Schema) -> None:
    for field in schema:
        if any(pa.types.is_binary(kind) or pa.types.is_interval(kind) for kind in _types_in(field.type)):
            raise UsageError(
                f"column {field.name!r} is {field.type}, which text formats cannot hold: cast it in the query"
            )


def _types_in(kind: pa.DataType) -> Iterator[pa.DataType]:
    yield kind
    for index in range(kind.num_fields):
        yield from _types_in(kind.field(index).type)


def _plain_numbers(batch: pa.RecordBatch | pa.Table) -> pl.DataFrame:
    """The batch with decimals as numbers: a sum of integers is one in DuckDB, and JSON would get a string."""
    columns = [
        _plain_number(column) if pa.types.is_decimal(column.type) else column for column in batch.columns
    ]
    frame = pl.from_arrow(pa.table(columns, names=batch.schema.names))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _plain_number(column: pa.Array) -> pa.Array:
    if column.type.scale:
        return pc.cast(column, pa.float64())
    try:
        return pc.cast(column, pa.int64())
    except pa.ArrowInvalid:
        # Beyond 64 bits no number type of JSON's readers is exact; digits are.
        return pc.cast(column, pa.string())


def _as_json(name: str) -> pl.Expr:
    encoded = pl.struct(pl.col(name).alias("v")).struct.json_encode()
    value = encoded.str.strip_prefix('{"v":').str.strip_suffix("}")
    return pl.when(pl.col(name).is_not_null()).then(value).alias(name)
