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
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import pyarrow as pa
from duckdb.func import FunctionNullHandling, PythonUDFType

from pear_data.errors import EXIT_ERROR, EXIT_INTERRUPTED, MismatchError, PearError, StuckError
from pear_data.store.joined_views import SPAN_LOG_RATIOS
from pear_data.store.manifest import FileEntry, Manifest
from pear_data.store.query_guard import Query, check, first_line, rows_where
from pear_data.store.span_ratios import span_log_ratios
from pear_data.store.sql_text import literal
from pear_data.store.view_sql import create_view, file_view_statements, joined_views, viewed_files

if TYPE_CHECKING:
    from pear_data.store.store import Store

Result = TypeVar("Result")

# Share of the free disk that a query may spill to; the rest belongs to whoever else is writing.
SPILL_SHARE = 0.5
# Seconds that DuckDB is given to hear an interrupt. It listens between vectors: one of huge values can take long.
PATIENCE = 10.0


class Views:
    """Queries over the views of one store. Made by `connect`.

    DuckDB runs on a thread of its own: a thread inside it hears neither Ctrl-C nor a clock. Views that join files are
    made for each query, with the columns it can see: see `joined_views`.
    """

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, manifest: Manifest, timeout: float | None
    ) -> None:
        self._connection = connection
        self._manifest = manifest
        self._bodies: dict[str, str] = {}
        self._timeout = timeout
        self._start = time.monotonic()
        self.stuck = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="duckdb")

    def table(self, query: str) -> pa.Table:
        """The whole result of a query.

        Raises:
            UsageError: the query is not a single reading statement.
            PearError: DuckDB refuses it (an unknown column, say), in its message's first line, or it took too long.
        """
        checked = self._checked(query)
        return self._run(lambda: self._bound(checked).to_arrow_table())

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a small result; `parameters` fill the `?` of the query. Raises as `table` does."""
        checked = self._checked(query)
        return self._run(lambda: self._bound(checked, list(parameters) or None).fetchall())

    def batches(self, query: str, rows: int) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Schema and batches of at most `rows` rows, computed as they are taken. Raises as `table` does."""
        checked = self._checked(query)
        reader = self._run(lambda: self._bound(checked).to_arrow_reader(rows))
        return reader.schema, iter(lambda: self._run(lambda: next(reader, None)), None)

    def query_where(self, select: str, predicate: str) -> str:
        """`select WHERE predicate`; raises UsageError where the predicate is no condition on one row of `select`."""
        with self._connection.cursor() as parser:
            return rows_where(select, predicate, parser)

    @property
    def memory_limit(self) -> int:
        """Bytes that DuckDB lets its own buffers take. What a function makes of one row is not among them."""
        with self._connection.cursor() as cursor:
            ((found,),) = cursor.execute(
                "SELECT parse_formatted_bytes(current_setting('memory_limit'))"
            ).fetchall()
        return int(found)

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=not self.stuck)

    def _checked(self, query: str) -> Query:
        with self._connection.cursor() as parser:
            return check(query, parser)

    def _bound(self, query: Query, parameters: list[Any] | None = None) -> duckdb.DuckDBPyRelation:
        """The query over views with only the columns it can see, or over whole ones where these do not do."""
        if query.columns is not None:
            self._make(query.columns, query.tables)
            try:
                return self._connection.sql(query.text, params=parameters)
            except (duckdb.BinderException, duckdb.CatalogException):
                # There is no such column, or it was named in a way that `check` does not know: whole views tell.
                pass
        self._make()
        return self._connection.sql(query.text, params=parameters)

    def _make(self, seen: Collection[str] | None = None, tables: Collection[str] | None = None) -> None:
        """Make the views `tables`, by default all, with the columns in `seen`, by default all."""
        for name, body in joined_views(self._manifest, seen).items():
            if (tables is None or name in tables) and self._bodies.get(name) != body:
                self._connection.execute(create_view(name, body))
                self._bodies[name] = body

    def _run(self, call: Callable[[], Result]) -> Result:
        future = self._thread.submit(call)
        try:
            left = None if self._timeout is None else self._timeout - (time.monotonic() - self._start)
            done, _ = wait([future], left)
        except BaseException:
            self._interrupt(future, "the query was interrupted", EXIT_INTERRUPTED)
            raise
        if not done:
            self._interrupt(future, f"the query ran longer than {self._timeout:g} s", EXIT_ERROR)
            raise PearError(f"the query ran longer than {self._timeout:g} s: narrow it, or raise --timeout")
        try:
            return future.result()
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            # Errors met while batches are read come through Arrow, as OSError.
            raise PearError(f"the query failed: {first_line(error)}") from None

    def _interrupt(self, future: Future[Any], why: str, exit_code: int) -> None:
        # A query that is about to start does not hear the first call.
        end = time.monotonic() + PATIENCE
        while not future.done():
            if time.monotonic() > end:
                self.stuck = True
                raise StuckError(
                    f"{why}, and did not hear that it was stopped: narrow it", exit_code
                ) from None
            self._connection.interrupt()
            wait([future], 0.05)


@contextlib.contextmanager
def connect(store: Store, *, timeout: float | None = None, memory: int | None = None) -> Iterator[Views]:
    """The views of a store: `corpus`, `scores`, `weights`, `samples`, `tokens`, `histograms` and `deciles`.

    Args:
        store: an open store. What other processes commit later is not seen.
        timeout: seconds after which queries are stopped; None waits for ever.
        memory: bytes that DuckDB may take before it spills to disk; None for 80 % of what the process may have.

    Raises:
        MismatchError: a committed file is missing, has another size than the manifest says, or a footer that cannot
            be read. Checksums are not computed here: that would read the whole store for every query;
            `pear-data verify` does.
    """
    paths = [_present(store, entry) for entry in viewed_files(store.manifest)]
    with tempfile.TemporaryDirectory(prefix="pear-data-sql-") as scratch:
        connection = duckdb.connect(":memory:", config=_configuration(scratch, memory))
        views: Views | None = None
        try:
            _make_views(connection, store, paths)
            views = Views(connection, store.manifest, timeout)
            try:
                yield views
            finally:
                views.close()
        finally:
            if views is None or not views.stuck:
                connection.close()


def _present(store: Store, entry: FileEntry) -> str:
    fault = store.fault_of(entry, size_only=True)
    if fault:
        raise MismatchError(
            f"{store.path / entry.path} {fault}: run `pear-data verify`, then the command that made it"
        )
    return os.path.join(os.path.abspath(store.path), entry.path)


def _configuration(scratch: str, memory: int | None) -> dict[str, Any]:
    """Settings of a fresh connection."""
    return {
        **({} if memory is None else {"memory_limit": f"{memory}B"}),
        "temp_directory": scratch,
        "max_temp_directory_size": f"{int(shutil.disk_usage(scratch).free * SPILL_SHARE)}B",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "allow_persistent_secrets": False,
        # A query must not read the variables of the Python program around it.
        "python_enable_replacements": False,
    }


def _make_views(connection: duckdb.DuckDBPyConnection, store: Store, paths: list[str]) -> None:
    connection.create_function(
        SPAN_LOG_RATIOS,
        span_log_ratios,
        ["FLOAT[]", "FLOAT[]", "INTEGER[]", "INTEGER[]"],
        "DOUBLE[]",
        type=PythonUDFType.ARROW,
        null_handling=FunctionNullHandling.SPECIAL,
    )
    _lock_down(connection, paths)
    try:
        for statement in file_view_statements(store.manifest, os.path.abspath(store.path)):
            connection.execute(statement)
    except duckdb.Error as error:
        # A view is bound to the schema in its files' footers, so a damaged or unreadable one is met here.
        raise MismatchError(
            f"a file of {store.path} cannot be read ({first_line(error)}): run `pear-data verify`, which names it"
        ) from None
    connection.execute("SET lock_configuration = true")


def _lock_down(connection: duckdb.DuckDBPyConnection, paths: list[str]) -> None:
    connection.execute(f"SET allowed_paths = [{', '.join(map(literal, paths))}]")
    connection.execute("SET enable_external_access = false")
