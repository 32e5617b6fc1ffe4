"""Writing one shard: rows buffered into row groups of about a million tokens, published when all are written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pear_data.schema import parquet_options
from pear_data.store.commit import atomic_path


@contextlib.contextmanager
def parquet_shard(final: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet writer whose file appears at `final` only when the block ends well.

    Each `write_table(table, row_group_size=len(table))` makes one row group.
    """
    with (
        atomic_path(final) as temporary,
        pq.ParquetWriter(temporary, schema, **parquet_options(schema)) as writer,
    ):
        yield writer


def write_group(writer: pq.ParquetWriter, table: pa.Table) -> None:
    """Write a table as one row group, so that every stage of a shard is cut at the same rows."""
    writer.write_table(table, row_group_size=max(1, len(table)))
