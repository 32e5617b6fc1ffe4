"""While a place is being written, every other command that would write there leaves at once, with who is at it."""

from __future__ import annotations

import os
import shutil

import pytest
from small_job import STORE, content, make_states

from pear_data.cli.entry import COMMANDS, run
from pear_data.demo import asset
from pear_data.store.lock import exclusive

TOKENIZER = str(asset("initial"))
RECIPE = """
store: elsewhere
steps:
  - weight: {level: token}
"""

# What would write to the store; "" stands for the folder of the job.
WRITERS = {
    "ingest": ["ingest", "corpus.jsonl", "--tokenizer", TOKENIZER],
    "score": ["score", "--policy", "third", "--from-field", "initial"],
    "weight": ["weight", "--level", "token"],
    "migrate": ["migrate"],
    "quarantine": ["quarantine", "retry", "corpus.jsonl"],
    "run": ["run", "recipe.yaml"],
}
# `demo` makes a store of its own, `export` a folder: see below. The others read.
OTHERS = {"demo", "export", "stats", "compare", "sql", "show", "report", "verify", "status"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return make_states(tmp_path_factory.mktemp("states"))["score with a model"]


@pytest.fixture
def folder(done, tmp_path, monkeypatch):
    work = shutil.copytree(done, tmp_path / "job")
    (work / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(work)
    return work


def refused(folder, arguments, capsys):
    """A command, given while somebody else writes, ends at once and changes nothing."""
    before = content(folder)
    assert run(arguments) == 1
    assert f"is being written by process {os.getpid()}: wait for it" in capsys.readouterr().err
    assert content(folder) == before


@pytest.mark.parametrize("name", [name for name in WRITERS if name in COMMANDS])
def test_a_second_writer_of_a_store_leaves_at_once(folder, capsys, name):
    with exclusive(folder / STORE):
        refused(folder, [*WRITERS[name], "--store", str(folder / STORE)], capsys)


def test_a_second_export_to_one_place_leaves_at_once(folder, capsys):
    place = folder / "new"
    with exclusive(folder / f".{place.name}.pear_export"):
        refused(folder, ["export", str(place), "--store", str(folder / STORE)], capsys)


def test_exports_and_readers_do_not_mind_a_writer_of_the_store(folder, capsys):
    with exclusive(folder / STORE):
        for arguments in (["verify"], ["export", str(folder / "new")], ["stats"], ["sql", "select 1"]):
            assert run([*arguments, "--store", str(folder / STORE)]) == 0


def test_every_command_is_one_that_writes_or_one_that_does_not():
    assert set(COMMANDS) <= WRITERS.keys() | OTHERS
