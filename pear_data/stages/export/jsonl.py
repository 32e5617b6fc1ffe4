"""Files of JSON lines, for the formats that are."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from pear_data.stages.export.formats import Write
from pear_data.stages.export.rows import Rows
from pear_data.store.commit import atomic_path, operation

Lines = Callable[[Rows], bytes]


def opener(lines: Lines) -> Callable[[Path], contextlib.AbstractContextManager[Write]]:
    """Writes `lines(rows)`, a line a sample."""

    @contextlib.contextmanager
    def opened(path: Path) -> Iterator[Write]:
        with atomic_path(path) as temporary:
            with operation("create", path):
                # Unbuffered, so that closing has nothing left to write that could fail.
                file = temporary.open("wb", buffering=0)

            def write(rows: Rows) -> int:
                left = memoryview(lines(rows))
                with operation("write", path):
                    while left:
                        left = left[file.write(left) :]
                return len(rows)

            with file:
                yield write

    return opened


def table_lines(table: pa.Table) -> bytes:
    """A line of JSON for each row; floats as the shortest decimals that are read as the same float64."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    buffer = io.BytesIO()
    frame.write_ndjson(buffer)
    return buffer.getvalue()


def object_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """A line of JSON for each row."""
    return b"".join(
        json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for row in rows
    )


def lines_fault(path: Path, fault_of: Callable[[dict[str, Any]], str | None]) -> str | None:
    """The first fault of a file's lines, or None."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                found = fault_of(json.loads(line))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                found = f"is no row of this format ({type(error).__name__}: {error})"
            if found:
                return f"line {number}: {found}"
    return None
