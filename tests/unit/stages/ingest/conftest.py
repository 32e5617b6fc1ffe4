from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ingest_cases import REWRITING, KilledError, save_tokenizer

from pear_data.config import IngestSettings
from pear_data.corpus.batches import token_batches
from pear_data.progress import Silent
from pear_data.schema import CORPUS, QUARANTINE
from pear_data.stages.ingest import ingest
from pear_data.store import commit, open_store, writable_store


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("plain"), template=None)


@pytest.fixture(scope="session")
def rewriting_tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("rewriting"), template=REWRITING)


class Said(Silent):
    """Remembers what was said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def run(tmp_path, tokenizer):
    """`run(corpus..., **settings)`: ingest into `tmp_path/store`; returns its outcome and what it said."""

    def run(*corpus, store="store", **settings):
        said = Said()
        settings = IngestSettings(
            corpus=[str(each) for each in corpus], **{"tokenizer": tokenizer, **settings}
        )
        with writable_store(tmp_path / store, create=True) as opened:
            return ingest(opened, settings, said), said.lines

    return run


@pytest.fixture
def read(tmp_path):
    """`read()`: the rows of `tmp_path/store` as dicts, after its schemas and counts are checked."""

    def read(store="store"):
        opened = open_store(tmp_path / store)
        stage = opened.stage("corpus")
        tables = []
        for shard in stage.shards:
            table = pq.read_table(opened.file(shard.file))
            assert table.schema.equals(CORPUS)
            assert len(table) == shard.rows
            assert sum(table["num_tokens"].to_pylist()) == shard.num_tokens
            assert sum(table["num_scored"].to_pylist()) == shard.num_scored
            assert sum(len(batch) for batch in token_batches(opened, shard)) == shard.rows
            tables.append(table)
        rows = pa.concat_tables(tables).to_pylist()
        for row in rows:
            assert row["num_tokens"] == len(row["input_ids"]) == len(row["loss_mask"])
            assert row["num_scored"] == sum(row["loss_mask"]) > 0
            assert not row["loss_mask"][0]
        return rows

    return read


@pytest.fixture
def quarantine(tmp_path):
    """`quarantine()`: (input, row, reason, raw) of every rejected row."""

    def quarantine(store="store"):
        opened = open_store(tmp_path / store)
        rows = []
        for shard in opened.stage("corpus").shards:
            if shard.quarantine:
                table = pq.read_table(opened.file(shard.quarantine))
                assert table.schema.equals(QUARANTINE)
                assert len(table) == shard.quarantined
                rows += [tuple(row.values()) for row in table.to_pylist()]
            else:
                assert shard.quarantined == 0
        return rows

    return quarantine


@pytest.fixture
def die_at(monkeypatch):
    """`die_at(n)`: the n-th write from now on raises; `die_at(None)`: none does. Returns the writes so far."""
    writes = []

    def arm(n):
        writes.clear()

        def on_operation(what, final):
            if what != "sync":
                return
            writes.append(final)
            if len(writes) == n:
                raise KilledError

        monkeypatch.setattr(commit, "on_operation", on_operation)
        return writes

    return arm
