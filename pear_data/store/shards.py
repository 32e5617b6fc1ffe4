"""Writing one shard: rows buffered into row groups of about a million tokens, published when all are written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pear_data.schema import parquet_options
from pear_data.store.commit import atomic_path, operation

SUMMARY_ROWS = 500_000


@contextlib.contextmanager
def parquet_shard(final: Path, schema: pa.Schema, *, in_runs: bool = False) -> Iterator[GroupWriter]:
    """A file to write row groups to, which appears at `final` only when the block ends well.

    Args:
        final: where.
        schema: of every row group.
        in_runs: see `parquet_options`.

    Raises:
        PearError: the disk refused, naming the path.
    """
    with atomic_path(final) as temporary:
        with operation("create", final):
            writer = pq.ParquetWriter(temporary, schema, **parquet_options(schema, in_runs=in_runs))
        try:
            yield GroupWriter(writer, final)
        except BaseException:
            with contextlib.suppress(OSError):
                writer.close()
            raise
        with operation("close", final):
            writer.close()


class GroupWriter:
    """Writes row groups to the file that will be at `final`."""

    def __init__(self, writer: pq.ParquetWriter, final: Path) -> None:
        self._writer, self._final = writer, final

    def write(self, table: pa.Table) -> None:
        """Write a table as one row group, so that every stage of a shard is cut at the same rows.

        Raises:
            PearError: the disk refused, naming the path.
        """
        with operation("write", self._final):
            self._writer.write_table(table, row_group_size=max(1, len(table)))


def summary_path(store: Path, key: str, name: str) -> Path:
    """Where the summary of shard `name` of stage `key` lies: in a tree of its own, never among the parts."""
    return store / "summary" / key / f"{name}.parquet"


def totals_path(store: Path, key: str, name: str) -> Path:
    """Where the totals of shard `name` of stage `key` lie."""
    return store / "summary" / key / f"{name}.totals.parquet"


@contextlib.contextmanager
def summary_shard(final: Path, schema: pa.Schema) -> Iterator[SummaryWriter]:
    """A summary to add tables to; its file appears at `final` only when the block ends well."""
    with parquet_shard(final, schema) as writer:
        summary = SummaryWriter(writer)
        yield summary
        summary.flush()


class SummaryWriter:
    """Gathers a shard's rows into row groups far larger than its parts': they hold no tokens."""

    def __init__(self, writer: GroupWriter) -> None:
        self._writer = writer
        self._tables: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Take in the rows of a row group."""
        self._tables.append(table)
        self._rows += len(table)
        if self._rows >= SUMMARY_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        if self._tables:
            self._writer.write(pa.concat_tables(self._tables).combine_chunks())
        self._tables, self._rows = [], 0
