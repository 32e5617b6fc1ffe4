"""Files of JSON lines, for the formats that are."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pear_data.stages.export.formats import Write
from pear_data.stages.export.rows import Rows
from pear_data.store.commit import atomic_path

Objects = Callable[[Rows], Iterable[dict[str, Any]]]


def opener(objects: Objects) -> Callable[[Path], contextlib.AbstractContextManager[Write]]:
    """Writes one line for each of `objects(rows)`."""

    @contextlib.contextmanager
    def opened(path: Path) -> Iterator[Write]:
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:

            def write(rows: Rows) -> int:
                count = 0
                for row in objects(rows):
                    count += 1
                    file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
                return count

            yield write

    return opened


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
