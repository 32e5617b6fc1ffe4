"""A read-only DuckDB connection over a store's views.

A guard, not a sandbox: queries that only read, over exactly the files the manifest has committed, with no network,
no extensions, no other file and bounded scratch space. Who can run `pear-data` can read the store anyway; the guard
keeps a pasted query from doing anything else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from pear_data.errors import MismatchError, PearError
from pear_data.store.manifest import FileEntry
from pear_data.store.query_guard import check, first_line
from pear_data.store.view_sql import literal, view_statements

if TYPE_CHECKING:
    from pear_data.store.store import Store

# Share of the free disk that a query may spill to; the rest belongs to whoever else is writing.
SPILL_SHARE = 0.5


class Views:
    """Queries over the views of one store. Made by `connect`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, timeout: float | None) -> None:
        self._connection = connection
        self._timeout = timeout
        self.timed_out = threading.Event()

    def execute(self, query: str, parameters: Sequence[Any] | None = None) -> duckdb.DuckDBPyRelation:
        """The result of a query, lazily; `parameters` fill its `?`.

        Raises:
            UsageError: the query is not a single reading statement.
            PearError: DuckDB refuses it (an unknown column, say); its message's first line.
        """
        with self._one_line_errors():
            return self._connection.sql(check(query), params=list(parameters) if parameters else None)

    def table(self, query: str) -> pa.Table:
        """The whole result of a query. Raises as `execute` does."""
        relation = self.execute(query)
        with self._one_line_errors():
            return relation.to_arrow_table()

    def rows(self, query: str, parameters: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
        """All rows of a small result. Raises as `execute` does."""
        relation = self.execute(query, parameters)
        with self._one_line_errors():
            return relation.fetchall()

    def batches(self, query: str, rows: int) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Schema and batches of at most `rows` rows, computed as they are taken. Raises as `execute` does."""
        relation = self.execute(query)
        with self._one_line_errors():
            reader = relation.to_arrow_reader(rows)
        return reader.schema, self._taken(reader)

    def _taken(self, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        with self._one_line_errors():
            for batch in reader:
                if self.timed_out.is_set():
                    raise duckdb.InterruptException("interrupted between batches")
                yield batch

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        # Errors met while batches are read come through Arrow, as OSError.
        try:
            yield
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            if self.timed_out.is_set():
                raise PearError(
                    f"the query ran longer than {self._timeout:g} s: narrow it, or raise --timeout"
                ) from None
            raise PearError(f"the query failed: {first_line(error)}") from None


@contextlib.contextmanager
def connect(store: Store, *, timeout: float | None = None) -> Iterator[Views]:
    """The views `corpus`, `scores`, `weights`, `samples` and `tokens` of a store; see `view_sql` for their columns.

    Args:
        store: an open store. What other processes commit later is not seen.
        timeout: seconds after which queries are stopped; None waits for ever.

    Raises:
        MismatchError: a committed file is missing or has another size than the manifest says. Checksums are not
            computed here: that would read the whole store for every query; `pear-data verify` does.
    """
    paths = [_present(store, entry) for entry in committed_files(store)]
    with tempfile.TemporaryDirectory(prefix="pear-data-sql-") as scratch:
        connection = duckdb.connect(":memory:", config=_configuration(scratch))
        views = Views(connection, timeout)
        timer = threading.Timer(timeout or 0, _stop, [views, connection])
        timer.daemon = True
        try:
            _lock_down(connection, paths)
            for statement in view_statements(store.manifest, os.path.abspath(store.path)):
                connection.execute(statement)
            connection.execute("SET lock_configuration = true")
            if timeout is not None:
                timer.start()
            yield views
        finally:
            timer.cancel()
            connection.close()


def committed_files(store: Store) -> list[FileEntry]:
    """Every file the views read."""
    manifest = store.manifest
    files = [shard.file for stage in manifest.stages.values() for shard in stage.shards]
    return files + ([manifest.tokenizer.vocabulary] if manifest.tokenizer else [])


def _present(store: Store, entry: FileEntry) -> str:
    fault = store.fault_of(entry, size_only=True)
    if fault:
        raise MismatchError(
            f"{store.path / entry.path} {fault}: run `pear-data verify`, then the command that made it"
        )
    return os.path.join(os.path.abspath(store.path), entry.path)


def _configuration(scratch: str) -> dict[str, Any]:
    """Settings of a fresh connection. DuckDB's own memory bound (80 % of what the process may have) stays."""
    return {
        "temp_directory": scratch,
        "max_temp_directory_size": f"{int(shutil.disk_usage(scratch).free * SPILL_SHARE)}B",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "allow_persistent_secrets": False,
        # A query must not read the variables of the Python program around it.
        "python_enable_replacements": False,
    }


def _lock_down(connection: duckdb.DuckDBPyConnection, paths: list[str]) -> None:
    connection.execute(f"SET allowed_paths = [{', '.join(map(literal, paths))}]")
    connection.execute("SET enable_external_access = false")


def _stop(views: Views, connection: duckdb.DuckDBPyConnection) -> None:
    views.timed_out.set()
    connection.interrupt()
