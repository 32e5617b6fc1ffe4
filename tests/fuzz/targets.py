"""What the fuzzer calls, by name: each reads bytes as one kind of file and lets through only a fault of ours.

What a reader raises for people (PearError) is no fault; whatever else it raises is, and so is a row that cannot be
written as JSON again.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from pear_data.config import IngestSettings
from pear_data.corpus.examples import Example, plan_input, rows_of
from pear_data.corpus.inputs import Input, Kind
from pear_data.corpus.records import Row, parse_json
from pear_data.corpus.stored_records import conversation_of
from pear_data.errors import PearError, SampleError
from pear_data.recipe import load_recipe
from pear_data.store.manifest import MANIFEST_NAME, read_manifest

# A table of a few bytes may hold a million rows, all alike.
ROWS = 300
VOCABULARY_SIZE = 300
SETTINGS = IngestSettings(corpus=["x"], tokenizer="x")


def _rows(data: bytes, kind: Kind) -> None:
    with tempfile.NamedTemporaryFile(dir=_folder()) as file:
        file.write(data)
        file.flush()
        source = Input(Path(file.name), "x", "x", kind)
        try:
            for row in islice(rows_of(source, 0), ROWS):
                assert row.number > 0
                if isinstance(row, Row):
                    json.loads(row.as_json())
                    row.as_json().encode()
                else:
                    _check_line(row.reason)
            plan = plan_input(source, SETTINGS, VOCABULARY_SIZE)
            for example in islice(plan.examples(0), ROWS):
                if isinstance(example, Example):
                    json.loads(example.record)
        except PearError as error:
            _check_line(str(error))


def _check_line(message: str) -> None:
    assert message
    assert "\n" not in message


def _folder() -> str | None:
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() else None


def lines(data: bytes) -> None:
    """JSON Lines, and the layouts of what is in them."""
    _rows(data, "jsonl")


def gzip(data: bytes) -> None:
    """JSON Lines packed by gzip."""
    _rows(data, "jsonl.gz")


def parquet(data: bytes) -> None:
    """A Parquet file."""
    _rows(data, "parquet")


def arrow(data: bytes) -> None:
    """An Arrow file or stream."""
    _rows(data, "arrow")


def record(data: bytes) -> None:
    """The record of a stored sample."""
    try:
        text = data.decode()
        if isinstance(parse_json(text), dict):
            conversation_of(text, (None, None))
    except (UnicodeDecodeError, SampleError):
        pass


def manifest(data: bytes) -> None:
    """A store's manifest."""
    with tempfile.TemporaryDirectory(dir=_folder()) as folder:
        (Path(folder) / MANIFEST_NAME).write_bytes(data)
        try:
            read_manifest(Path(folder))
        except PearError as error:
            _check_line(str(error))


def recipe(data: bytes) -> None:
    """A recipe."""
    with tempfile.NamedTemporaryFile(dir=_folder(), suffix=".yaml") as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(PearError):
            load_recipe(file.name)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (lines, gzip, parquet, arrow, record, manifest, recipe)
}
