"""Rows rejected at ingest, mended by the user: those that fit now become samples, in a shard of their own.

It stands behind all others, so that nothing that was read, scored or weighted before is touched. Beside it a file names
the quarantined rows that it mends; where the shard is lost, they are in quarantine again by that alone.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pear_data.chat.messages import Conversation
from pear_data.chat.tokenization import RAW, ChatTokenizer
from pear_data.chat.tokenizers import load_tokenizer, tokenizer_fingerprint
from pear_data.config import IngestSettings
from pear_data.corpus.duplicates import duplicate_error
from pear_data.corpus.examples import Example, Plan, stored_plan
from pear_data.corpus.lines import read_lines
from pear_data.corpus.records import Rejected, Row, parse_object, rejected, shown
from pear_data.corpus.stored_tokenizer import FOLDER
from pear_data.errors import MismatchError, SampleError, UsageError
from pear_data.progress import Outcome, Progress
from pear_data.schema import MENDED
from pear_data.stages.ingest import CONTENT_SETTINGS, DATE, DESCRIBED, total_counts
from pear_data.stages.ingest_batches import BATCH_BYTES, Batch, take, tokenized
from pear_data.stages.ingest_shard import ShardWriter, shard_writer
from pear_data.stages.quarantine import Place, mended_places, quarantined_places
from pear_data.store import Store
from pear_data.store.manifest import CORPUS, Shard, Stage
from pear_data.store.shards import parquet_shard

SHOWN_REASONS = 5
_FORM = 'a line is {"input": ..., "row": ..., "raw": ...}, as `pear-data quarantine list -o FILE` writes it'


def mend(store: Store, path: Path, progress: Progress, *, trust_remote_code: bool = False) -> Outcome:
    """Take mended rows into a complete corpus; the caller holds the writer's lock.

    `path` holds JSON Lines as `pear-data quarantine list` writes them; `raw` is the mended row, as JSON in a string or
    as the object itself. Rows that are mended already are passed over, so that a killed run can be given again.

    Raises:
        UsageError: the corpus is not complete, or a line of the file is not of a row in quarantine.
        PearError: an id occurs twice, or the disk refused.
        MismatchError: the store is damaged.
    """
    corpus = store.complete_stage(CORPUS)
    found, before = quarantined_places(store), mended_places(store)
    count = _checked(path, found)
    mending = _mending(store, corpus, trust_remote_code)
    progress.begin("mended rows", count, "rows")
    mended = 0
    try:
        batches = mending.batches(_rows(path, before), progress)
        while (first := next(batches, None)) is not None:
            shard = _write_shard(store, corpus, itertools.chain([first], batches))
            progress.shard(shard.name, f"{shard.mended_rows:,} rows mended, {shard.rows:,} samples")
            mended += shard.mended_rows
    finally:
        progress.end()
    for row in mending.shown:
        progress.say(f"still rejected: {row}")
    rest = f"{mending.refused:,} of those given are still rejected; " if mending.refused else ""
    then = "; run `score` and `weight` again, which do the new rows alone" if mended else ""
    return Outcome(
        f"corpus: {mended:,} rows mended; {rest}{corpus.quarantined:,} rows are left in quarantine{then}",
        corpus.quarantined,
    )


def _checked(path: Path, found: set[Place]) -> int:
    """How many rows of the corpus the file names, each once and each in quarantine now or before."""
    seen: set[Place] = set()
    for number, place, _ in _lines(path):
        where = f"{path}:{number}: row {place[1]} of {shown(place[0])}"
        if place not in found:
            raise UsageError(f"{where} was never in quarantine: {_FORM}")
        if place in seen:
            raise UsageError(f"{where} is given twice")
        seen.add(place)
    return len(seen)


def _lines(path: Path) -> Iterator[tuple[int, Place, dict[str, Any]]]:
    """Number, place and fields of each line that is of the corpus."""
    try:
        for line in read_lines(path, None, 0):
            if isinstance(line, Rejected):
                raise UsageError(f"{path}:{line.number}: {line.reason}: {_FORM}")
            fields = line.fields
            if fields.get("stage", CORPUS) != CORPUS:
                continue
            name, row = fields.get("input"), fields.get("row")
            if not isinstance(name, str) or not isinstance(row, int) or isinstance(row, bool):
                raise UsageError(f"{path}:{line.number}: without 'input' and 'row': {_FORM}")
            yield line.number, (name, row), fields
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror or error}): {_FORM}") from error


def _rows(path: Path, before: set[Place]) -> Iterator[tuple[str, Row | Rejected]]:
    """The mended rows, each with its input's name and under its own number there."""
    for _, place, fields in _lines(path):
        if place not in before:
            yield place[0], _mended_row(place[1], fields)


def _mended_row(number: int, fields: dict[str, Any]) -> Row | Rejected:
    raw = fields.get("raw")
    if isinstance(raw, dict):
        return Row(number, raw)
    try:
        if isinstance(raw, str):
            line = raw.encode()
        else:
            line = base64.b64decode(str(fields.get("raw_base64", "")), validate=True)
        return Row(number, *parse_object(line), line)
    except (SampleError, ValueError) as error:
        return rejected(number, str(error), b"")


def _mending(store: Store, corpus: Stage, trust_remote_code: bool) -> _Mending:
    """What ingest knew, read back from the store: neither its files nor its model are needed again."""
    known = store.manifest.tokenizer
    assert known is not None, "a corpus without its tokenizer"
    described = corpus.decisions[DESCRIBED]
    for file in known.files:
        store.file(file)
    tokenizer = load_tokenizer(str(store.path / FOLDER), trust_remote_code=trust_remote_code)
    settings = {name: corpus.settings[name] for name in CONTENT_SETTINGS}
    given = IngestSettings(corpus=list(described), tokenizer=known.name, **settings)
    template = corpus.settings["chat_template"]
    chat = None
    if template != RAW:
        day = corpus.settings.get(DATE)
        chat = ChatTokenizer(
            tokenizer,
            None if tokenizer.chat_template else RAW,
            given.turns,
            date.fromisoformat(day) if day else None,
        )
    made_by = (tokenizer_fingerprint(tokenizer), chat.template_fingerprint() if chat else RAW)
    if made_by != (corpus.settings["tokenizer"], template):
        raise MismatchError(
            f"the tokenizer in {store.path / FOLDER} reads back as another than made the corpus: mend the files "
            "themselves and ingest them into a new --store"
        )
    vocabulary_size = max(tokenizer.get_vocab().values()) + 1
    return _Mending(corpus, given, described, chat, vocabulary_size)


@dataclass(slots=True)
class _Mending:
    """Makes mended rows samples, as ingest would have; counts those that it would still have rejected."""

    corpus: Stage
    settings: IngestSettings
    described: dict[str, str]
    chat: ChatTokenizer | None
    vocabulary_size: int
    plans: dict[str, Plan] = field(default_factory=dict)
    refused: int = 0
    shown: list[str] = field(default_factory=list)

    def batches(
        self, rows: Iterator[tuple[str, Row | Rejected]], progress: Progress
    ) -> Iterator[tuple[Batch, list[Place]]]:
        """Batches that hold samples, each with the places of the rows that these come from."""
        cursor = self.corpus.shards[-1].cursor
        assert cursor is not None
        examples = ((name, self._example(name, row)) for name, row in rows)
        while taken := take(examples, BATCH_BYTES):
            batch = tokenized(taken, self.chat, cursor)
            refused = {(name, row.number) for name, row in batch.rejected}
            self.refused += len(refused)
            for name, row in batch.rejected[: SHOWN_REASONS - len(self.shown)]:
                self.shown.append(f"{name}:{row.number}: {row.reason}")
            batch.rejected = []
            progress.advance(len(taken))
            places = [(name, row.number) for name, row in taken if (name, row.number) not in refused]
            if places:
                yield batch, places

    def _example(self, name: str, row: Row | Rejected) -> Example | Rejected:
        if isinstance(row, Rejected):
            return row
        if name not in self.plans:
            plan = stored_plan(name, self.described[name], row, self.settings, self.vocabulary_size)
            if plan is None:
                return rejected(row.number, "fits no layout, or lacks a field asked for at ingest", row.raw())
            self.plans[name] = plan
        example = self.plans[name].example(row)
        if self.chat is None and isinstance(example, Example) and isinstance(example.content, Conversation):
            return rejected(row.number, "is text, and the corpus came as token ids", row.raw())
        return example


def _write_shard(store: Store, corpus: Stage, batches: Iterator[tuple[Batch, list[Place]]]) -> Shard:
    """Write and commit one more shard of the corpus; the stages made from it are not complete any more."""
    name = f"part-{len(corpus.shards):05d}"
    places: list[Place] = []
    with shard_writer(store, name) as writer:
        for batch, mended in batches:
            writer.add(batch)
            places += mended
            if writer.num_tokens >= corpus.settings["shard_tokens"]:
                break
        _check_ids(store, corpus, writer)
    final = store.path / "quarantine" / f"mended-{name}.parquet"
    with parquet_shard(final, MENDED) as file:
        columns = [pa.array(column) for column in zip(*places, strict=True)]
        file.write(pa.table(columns, schema=MENDED))
    shard = writer.entry().model_copy(update={"mended": store.entry_of(final), "mended_rows": len(places)})
    for key, stage in store.manifest.stages.items():
        stage.complete &= key == CORPUS
    store.commit(CORPUS, shard)
    corpus.decisions["counts"] = total_counts(corpus)
    store.save()
    return shard


def _check_ids(store: Store, corpus: Stage, writer: ShardWriter) -> None:
    """Refuse ids that samples of the corpus have already."""
    new = pa.array(list(writer.places), pa.string())
    for shard in corpus.shards:
        start = 0
        for table in store.row_groups(shard, ["sample_id"]):
            row = pc.index(pc.is_in(table["sample_id"], value_set=new), True).as_py()
            if row >= 0:
                sample_id = table["sample_id"][row].as_py()
                raise duplicate_error(
                    sample_id, f"row {start + row + 1} of {shard.file.path}", writer.places[sample_id]
                )
            start += len(table)
