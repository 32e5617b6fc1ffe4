"""Rows of an input as examples: which fields hold what is decided once per input, on its first good row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pear_data.config import IngestSettings
from pear_data.corpus import bounded_memory
from pear_data.corpus.inputs import Input, stem_of
from pear_data.corpus.layouts import LAYOUTS, Content, Fields, Layout, Tokens, pair_layout, recognised
from pear_data.corpus.lines import read_lines
from pear_data.corpus.records import Rejected, Row, rejected, shown
from pear_data.corpus.tables import read_arrow, read_parquet
from pear_data.errors import PearError, SampleError, UsageError

ROW_IDS = ":row"  # as --id-field: number the rows, whatever ids they carry
ID_FIELDS = ("sample_id", "id", "uuid")
SOURCE_FIELD = "source"  # read where a row has it, unless another field is named
LABEL_FIELD = "label"  # read only when asked for: in many corpora it is a class
_HEAD = 1000  # readable rows among which one must fit a layout


@dataclass(frozen=True, slots=True)
class Example:
    """A row in the common form, before it is tokenized. `record` is the row as JSON."""

    row: Row
    sample_id: str
    source: str
    label: int
    content: Content
    record: str

    @property
    def number(self) -> int:
        return self.row.number


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rows of one input are read; `layout` is None where not one of them is readable."""

    input: Input
    layout: Layout | None
    also_fits: tuple[str, ...]
    id_field: str | None  # None: ids are the rows' places
    unread_label: bool
    settings: IngestSettings
    vocabulary_size: int  # one more than the largest token id

    def describe(self) -> str:
        """What was recognised, in a few words."""
        if self.layout is None:
            return "no readable row"
        also = (
            f" (fits {', '.join(self.also_fits)} too; the first in order is taken)" if self.also_fits else ""
        )
        ids = f"field {self.id_field!r}" if self.id_field else "row numbers"
        label = (
            f"; field {LABEL_FIELD!r} is not read (--label-field {LABEL_FIELD} takes it as 1 or -1)"
            if self.unread_label
            else ""
        )
        return f"layout {self.layout.name}{also}, ids from {ids}{label}"

    def examples(self, skip: int) -> Iterator[Example | Rejected]:
        """One for every row after the first `skip`.

        Raises:
            PearError: the file is damaged.
        """
        for row in rows_of(self.input, skip):
            if isinstance(row, Rejected):
                yield row
                continue
            yield self.example(row)

    def example(self, row: Row) -> Example | Rejected:
        """What becomes of one row."""
        try:
            return self._example(row)
        except SampleError as error:
            return rejected(row.number, str(error), row.raw())

    def _example(self, row: Row) -> Example:
        assert self.layout is not None, "a row became readable after the plan was made"
        content = self.layout.content(row.fields)
        if isinstance(content, Tokens):
            self._check_ids(content)
        label = self.settings.label_field
        return Example(
            row,
            self._sample_id(row),
            self._source(row),
            _label(row.fields, label) if label else 1,
            content,
            row.as_json(without=self.layout.stored),
        )

    def _source(self, row: Row) -> str:
        if self.settings.source_field:
            return _text(row.fields, self.settings.source_field)
        found = row.fields.get(SOURCE_FIELD)
        source = found if isinstance(found, str) and found else self.input.source
        if not source:
            raise SampleError(
                f"field {SOURCE_FIELD!r} is missing, and the file's name does not tell the source"
            )
        return source

    def _check_ids(self, tokens: Tokens) -> None:
        strange = (tokens.input_ids < 0) | (tokens.input_ids >= self.vocabulary_size)
        if strange.any():
            position = int(strange.argmax())
            raise SampleError(
                f"token id {tokens.input_ids[position]} at position {position} is none of the tokenizer's "
                f"{self.vocabulary_size}"
            )

    def _sample_id(self, row: Row) -> str:
        if self.id_field is None:
            return f"{self.input.name}:{row.number}"
        sample_id = _text(row.fields, self.id_field)
        if not sample_id:
            raise SampleError(f"field {self.id_field!r} is empty: it holds the sample id")
        return sample_id


def plan_input(source: Input, settings: IngestSettings, vocabulary_size: int) -> Plan:
    """Decide how an input is read, from its first row that fits a layout and has the fields asked for.

    Raises:
        UsageError: none of its first readable rows does.
        PearError: the file is damaged.
    """
    first: Row | None = None
    readable = (row for row in rows_of(source, 0) if isinstance(row, Row))
    for row in itertools.islice(readable, _HEAD):
        first = first or row
        plan = _plan(source, row, settings, vocabulary_size)
        if plan is not None:
            return plan
    if first is not None:
        raise UsageError(_nothing_fits(source, first, settings))
    return Plan(source, None, (), None, False, settings, vocabulary_size)


def _plan(source: Input, row: Row, settings: IngestSettings, vocabulary_size: int) -> Plan | None:
    """The plan that a row decides, if it fits a layout and has the fields asked for."""
    asked = [settings.source_field, settings.label_field]
    asked += [] if settings.id_field == ROW_IDS else [settings.id_field]
    layouts = _layouts(row.fields, settings)
    if not layouts or any(row.fields.get(name) is None for name in asked if name):
        return None
    names = tuple(layout.name for layout in layouts[1:])
    id_field = _id_field(row.fields, settings)
    unread_label = settings.label_field is None and LABEL_FIELD in row.fields
    return Plan(source, layouts[0], names, id_field, unread_label, settings, vocabulary_size)


def stored_plan(
    name: str, description: str, row: Row, settings: IngestSettings, vocabulary_size: int
) -> Plan | None:
    """The plan of an input read earlier, from what `Plan.describe` said of it.

    Where it had no readable row, `row` decides, if it can. `Input.source` is empty where the name does not tell it.
    """
    file = name.rpartition("/")[2]
    source = Input(Path(name), name, "" if file.endswith(".arrow") else stem_of(file), "jsonl")
    known = list(LAYOUTS)
    if settings.prompt_field and settings.response_field:
        known.insert(0, pair_layout(settings.prompt_field, settings.response_field))
    for layout in known:
        if description.startswith((f"layout {layout.name} (fits ", f"layout {layout.name}, ids from ")):
            ids = description.rpartition(", ids from ")[2]
            asked = ID_FIELDS if settings.id_field in (None, ROW_IDS) else (settings.id_field,)
            id_field = next((field for field in asked if ids.startswith(f"field {field!r}")), None)
            return Plan(source, layout, (), id_field, False, settings, vocabulary_size)
    return _plan(source, row, settings, vocabulary_size)


def rows_of(source: Input, skip: int) -> Iterator[Row | Rejected]:
    """The rows of an input after its first `skip`.

    Raises:
        PearError: the file is damaged or cannot be read.
    """
    try:
        if source.kind == "parquet":
            yield from read_parquet(source.path, skip)
        elif source.kind == "arrow":
            yield from read_arrow(source.path, skip)
        else:
            compression = {"jsonl.gz": "gzip", "jsonl.zst": "zstd"}.get(source.kind)
            yield from read_lines(source.path, compression, skip)
    except MemoryError as error:
        bound = bounded_memory.DECODING_BYTES / 2**30
        raise PearError(
            f"{source.name} decodes to more than {bound:g} GiB in one piece: write it again with smaller batches, row "
            "groups and pages"
        ) from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise PearError(
            f"{source.name} is damaged or unreadable ({reason}): get a whole copy of it"
        ) from error


def _layouts(fields: Fields, settings: IngestSettings) -> list[Layout]:
    if settings.prompt_field and settings.response_field:
        named = pair_layout(settings.prompt_field, settings.response_field)
        return [named] if named.fits(fields) else []
    return recognised(fields)


def _id_field(fields: Fields, settings: IngestSettings) -> str | None:
    if settings.id_field:
        return None if settings.id_field == ROW_IDS else settings.id_field
    return next((name for name in ID_FIELDS if _is_text(fields.get(name))), None)


def _nothing_fits(source: Input, first: Row, settings: IngestSettings) -> str:
    fields = ", ".join(shown(name, 40) for name in list(first.fields)[:30]) or "none"
    asked = [getattr(settings, f"{role}_field") for role in ("prompt", "response", "id", "source", "label")]
    named = ", ".join(name for name in asked if name and name != ROW_IDS)
    known = "; ".join(layout.name for layout in LAYOUTS)
    wanted = f"has the fields {named}" if named else "fits a layout"
    return (
        f"{source.name}: no row {wanted}; fields of row {first.number}: {fields}; layouts known: {known}; others need "
        "--prompt-field and --response-field"
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise SampleError(f"field {name!r} is missing or null")
    if not _is_text(value):
        raise SampleError(f"field {name!r} is neither a string nor an integer")
    return str(value)


def _label(fields: Fields, name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (1, -1):
        raise SampleError(f"field {name!r} is {shown(value)}: a label is 1 or -1")
    return int(value)
