"""The store's promises: shards exist when their entry does, damage is found, one writer, settings are kept."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

import pear_data.store.commit as commit
from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.schema import FLOATS, INT32S, SCORES
from pear_data.store import open_store, writable_store
from pear_data.store.columns import list_column
from pear_data.store.manifest import Shard
from pear_data.store.shards import parquet_shard

KEY = "scores/initial"


def rows(ids):
    lengths = np.arange(1, len(ids) + 1)
    return pa.table(
        [
            pa.array(ids),
            list_column(-np.ones(lengths.sum(), dtype=np.float32), lengths, FLOATS),
            pa.nulls(len(ids), INT32S),
            pa.array(lengths, pa.int32()),
            pa.array(-lengths.astype(float)),
            pa.array(["ok"] * len(ids)),
        ],
        schema=SCORES,
    )


def write_shard(store, name, ids):
    final = store.path / KEY / f"{name}.parquet"
    with parquet_shard(final, SCORES) as writer:
        for start in range(0, len(ids), 2):
            writer.write(rows(ids[start : start + 2]))
    store.commit(KEY, Shard(name=name, file=store.entry_of(final), rows=len(ids), num_tokens=0, num_scored=0))


@pytest.fixture
def folder(tmp_path):
    with writable_store(tmp_path / "store", create=True) as store:
        store.begin(KEY, {"model": "a", "nested": {"dtype": "float32"}})
        write_shard(store, "part-00000", ["a", "b", "c"])
    return tmp_path / "store"


def test_round_trip(folder):
    store = open_store(folder)
    (shard,) = store.stage(KEY).shards
    groups = list(store.row_groups(shard))
    assert [table["sample_id"].to_pylist() for table in groups] == [["a", "b"], ["c"]]
    assert groups[0].schema == SCORES
    assert store.scores["initial"].count_rows() == 3
    assert not list(folder.rglob("*.tmp"))


def test_equal_settings_resume_and_others_are_refused_by_field(folder):
    with writable_store(folder) as store:
        assert store.begin(KEY, {"model": "a", "nested": {"dtype": "float32"}}).shards
        with pytest.raises(MismatchError, match=r'nested\.dtype: was "float32", now "bfloat16"'):
            store.begin(KEY, {"model": "a", "nested": {"dtype": "bfloat16"}})
        assert not store.begin(KEY, {"model": "b"}, overwrite=True).shards


def test_names_that_differ_only_in_case_are_refused(folder):
    with writable_store(folder) as store, pytest.raises(UsageError, match="SQL does not tell it"):
        store.begin("scores/Initial", {})


def test_a_stage_without_a_shard_gives_way(folder):
    with writable_store(folder) as store:
        store.begin("weights/block", {"gamma": 0.9})
        assert store.begin("weights/block", {"gamma": 0.5}).settings == {"gamma": 0.5}


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_shard_is_found(folder, keep):
    path = folder / KEY / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    store = open_store(folder)
    (shard,) = store.stage(KEY).shards
    assert not store.is_current(KEY, shard, {})
    with pytest.raises(MismatchError, match="bytes where the manifest says"):
        list(store.row_groups(shard))


def test_every_flipped_bit_is_found(folder):
    path = folder / KEY / "part-00000.parquet"
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[random.integers(len(whole))] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        store = open_store(folder)
        assert not store.is_current(KEY, store.stage(KEY).shards[0], {})
        with pytest.raises(MismatchError, match="sha256"):
            list(store.row_groups(store.stage(KEY).shards[0]))
    path.write_bytes(whole)
    store = open_store(folder)
    assert len(list(store.row_groups(store.stage(KEY).shards[0]))) == 2


def test_a_failed_write_leaves_no_trace(folder, monkeypatch):
    before = sorted(path.name for path in folder.rglob("*"))

    def fail(what, path):
        raise OSError(28, "No space left on device")

    with writable_store(folder) as store:
        monkeypatch.setattr(commit, "on_operation", fail)
        with pytest.raises(PearError, match=r"cannot write .*part-00001.parquet: No space left.*free space"):
            write_shard(store, "part-00001", ["d"])
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert [shard.name for shard in open_store(folder).stage(KEY).shards] == ["part-00000"]


def test_an_exception_while_writing_leaves_no_file(folder):
    final = folder / KEY / "part-00001.parquet"
    with pytest.raises(RuntimeError), parquet_shard(final, SCORES) as writer:
        writer.write(rows(["d"]))
        raise RuntimeError
    assert not list(folder.rglob("part-00001*"))


def test_a_second_writer_leaves_at_once(folder):
    script = f"from pear_data.store import writable_store\nwith writable_store({str(folder)!r}): pass"
    with writable_store(folder):
        second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "is being written by process" in second.stderr
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_leftovers_of_a_killed_writer_are_swept(folder):
    (folder / KEY / "part-00001.parquet.tmp").write_bytes(b"half")
    (folder / "tokenizer.tmp").mkdir()
    (folder / "tokenizer.tmp" / "tokenizer.json").write_bytes(b"half")
    with writable_store(folder):
        assert not list(folder.rglob("*.tmp"))


def test_no_store_newer_store_damaged_manifest(folder, tmp_path):
    with pytest.raises(PearError, match="no store at"):
        open_store(tmp_path / "nowhere")
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(PearError, match="format version 99.*upgrade"):
        open_store(folder)
    for text in ("", "{", "[]", '{"format_version": 1, "stages": 3}'):
        manifest.write_text(text)
        with pytest.raises(MismatchError, match="not a readable manifest"):
            open_store(folder)


def test_settings_changed_in_the_manifest_are_found(folder):
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("float32", "float16"))
    with pytest.raises(
        MismatchError, match="the settings of scores/initial are not those of its fingerprint"
    ):
        open_store(folder)


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PearError, match=r"cannot write .*file/x/y: Not a directory; .*another place"):
        commit.write_atomically(tmp_path / "file" / "x" / "y", "text")


def test_a_folder_with_other_things_is_never_made_a_store(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is no store"), writable_store(tmp_path, create=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_missing_stage_says_what_makes_it(folder):
    store = open_store(folder)
    with pytest.raises(UsageError, match="pear-data score --policy behavior"):
        store.stage("scores/behavior")
    with pytest.raises(UsageError, match="pear-data weight --name token"):
        store.stage("weights/token")


def test_sql_gives_an_arrow_table(make_store, samples):
    store = open_store(make_store(samples))
    table = store.sql("select sample_id, num_scored from samples order by sample_id limit 2")
    assert table.to_pylist() == [
        {"sample_id": "s0", "num_scored": samples[0].loss_mask.sum()},
        {"sample_id": "s1", "num_scored": samples[1].loss_mask.sum()},
    ]
    with pytest.raises(UsageError, match="is refused"):
        store.sql("drop view corpus")
