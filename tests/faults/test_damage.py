"""Files cut short and single bits flipped: found by `verify` and by whoever reads the file, made again by its step."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from small_job import STEPS, STORE, content, whole_states

from pear_data import open_store
from pear_data.config import ExportSettings, ScoreSettings, WeightSettings
from pear_data.errors import MismatchError
from pear_data.progress import Silent
from pear_data.stages.export import export
from pear_data.stages.score import score_policy
from pear_data.stages.statistics import statistics
from pear_data.stages.verify import verify
from pear_data.stages.weight import weight
from pear_data.store import writable_store

FLIPS = 100
CUTS = 16

# One file of each kind, and the step that makes it.
KINDS = {
    "corpus/part-00001.parquet": "ingest",
    "summary/corpus/part-00001.parquet": "ingest",
    "scores/behavior/part-00001.parquet": "score behavior",
    "weights/block/part-00001.parquet": "weight",
    "summary/weights/block/part-00001.parquet": "weight",
    "summary/weights/block/part-00001.totals.parquet": "weight",
    "quarantine/corpus-part-00000.parquet": "ingest",
    "tokenizer/tokenizer.json": "ingest",
    "tokenizer/vocabulary.parquet": "ingest",
}


class Heard(Silent):
    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)


def score_again(folder):
    with writable_store(folder / STORE) as store:
        score_policy(store, ScoreSettings(policy="again", from_field="initial"), Silent())


def weigh_again(folder, **settings):
    with writable_store(folder / STORE) as store:
        weight(store, WeightSettings(name="again", **settings), Silent())


def weigh_by_lines(folder):
    weigh_again(folder, block_by="lines")


def export_again(folder, **settings):
    export(open_store(folder / STORE), ExportSettings(out=str(folder / "again"), **settings), Silent())


def export_where(folder):
    export_again(folder, where="weight_mean > 0")


def measure(folder):
    statistics(open_store(folder / STORE))


# Who reads what; the quarantine and the text of single ids are for people to look at.
READERS = {
    "corpus/": (score_again, export_again, weigh_by_lines),
    "summary/corpus/": (weigh_again, export_where),
    "scores/initial/": (weigh_again,),
    "scores/behavior/": (weigh_again,),
    "scores/model/": (),
    "scores/flaky/": (),
    "weights/": (export_again,),
    "tokenizer/vocabulary": (),
    "tokenizer/": (weigh_by_lines,),
    "quarantine/": (),
    "manifest.json": (score_again, weigh_again, export_again, measure),
}


def readers_of(path):
    if path.endswith(".totals.parquet"):
        return (measure,)
    if path.startswith("summary/weights/"):
        return (export_where,)
    return next(readers for prefix, readers in READERS.items() if path.startswith(prefix))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return whole_states(tmp_path_factory.mktemp("states"))


@pytest.fixture
def folder(done, tmp_path):
    return shutil.copytree(done, tmp_path / "job")


def cut_everywhere(folder, kind, cuts=CUTS):
    """Cut a file at every so manieth of its length; its step makes it again each time. How often that was."""
    path = folder / STORE / kind
    whole = content(folder)
    for cut in range(cuts):
        path.write_bytes(path.read_bytes()[: path.stat().st_size * cut // cuts])
        heard = Heard()
        with pytest.raises(MismatchError):
            verify(open_store(folder / STORE), heard)
        assert any(line.startswith(f"{path} has ") for line in heard.said)
        STEPS[KINDS[kind]](folder)
        assert content(folder) == whole
    return cuts


def flip_bits(folder, flips):
    """Flip one bit of one file at a time; `verify` and all who read that file refuse. How many readers did."""
    random = np.random.default_rng(0)
    whole = content(folder / STORE)
    names, refused = sorted(whole), 0
    for name in random.choice(names, flips).tolist():
        flipped = bytearray(whole[name])
        flipped[random.integers(len(flipped))] ^= 1 << random.integers(8)
        (folder / STORE / name).write_bytes(flipped)
        with pytest.raises(MismatchError):
            verify(open_store(folder / STORE), Silent())
        for read in readers_of(name):
            with pytest.raises(MismatchError):
                read(folder)
            refused += 1
        (folder / STORE / name).write_bytes(whole[name])
        (folder / STORE / "manifest.json").write_bytes(whole["manifest.json"])
    now = content(folder / STORE)
    assert {name: now[name] for name in names} == whole
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_is_found_and_made_again(folder, kind):
    cut_everywhere(folder, kind, 2 if kind.startswith(("quarantine", "tokenizer")) else CUTS)


def test_every_flipped_bit_is_found_by_verify_and_by_every_reader(folder):
    assert flip_bits(folder, FLIPS) >= FLIPS


def test_readers_of_sound_files_go_on(folder):
    for read in {read for readers in READERS.values() for read in readers}:
        read(folder)
        shutil.rmtree(folder / "again", ignore_errors=True)
        with writable_store(folder / STORE) as store:
            store.manifest.stages.pop("weights/again", None)
            store.save()
