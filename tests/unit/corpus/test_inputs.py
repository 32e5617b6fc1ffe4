from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import sys
import threading

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pear_data.corpus.inputs import opened_inputs, sha256_of
from pear_data.errors import PearError, UsageError

LINE = b'{"prompt": "a", "completion": "b"}\n'


def found(corpus, spool):
    with opened_inputs([str(each) for each in corpus], spool) as inputs:
        return [(source.name, source.source, source.kind) for source in inputs]


def test_kinds_are_told_by_content_not_by_name(tmp_path):
    table = pa.table({"prompt": ["a"], "completion": ["b"]})
    pq.write_table(table, tmp_path / "a.data")
    with pa.ipc.new_stream(tmp_path / "b.data", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(tmp_path / "c.data", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "d.data").write_bytes(gzip.compress(LINE))
    (tmp_path / "e.data").write_bytes(zstandard.compress(LINE))
    (tmp_path / "f.data").write_bytes(LINE)
    (tmp_path / "g.data").write_bytes(b"")
    kinds = [kind for _, _, kind in found(sorted(tmp_path.iterdir()), tmp_path)]
    assert kinds == ["parquet", "arrow", "arrow", "jsonl.gz", "jsonl.zst", "jsonl", "jsonl"]


def test_names_are_as_short_as_tells_them_apart(tmp_path):
    for name in ("one/train.jsonl", "two/train.jsonl.gz", "two/x/train.jsonl", "three/x/train.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(LINE)
    corpus = [
        tmp_path / "two" / "x" / "train.jsonl",
        tmp_path / "three" / "x" / "train.jsonl",
        tmp_path / "two" / "train.jsonl.gz",
        tmp_path / "one" / "train.jsonl",
    ]
    assert found(corpus, tmp_path) == [
        ("two/x/train.jsonl", "train", "jsonl"),
        ("three/x/train.jsonl", "train", "jsonl"),
        ("train.jsonl.gz", "train", "jsonl"),
        ("one/train.jsonl", "train", "jsonl"),
    ]


def test_a_file_given_twice_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE)
    with pytest.raises(UsageError, match="given twice"):
        found([path, path], tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "link.jsonl").symlink_to(path)
    for other in (tmp_path / "x" / ".." / "a.jsonl", tmp_path / "link.jsonl"):
        with pytest.raises(UsageError, match="given twice"):
            found([path, other], tmp_path)


def test_a_folder_of_files(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.jsonl.zst", ".hidden.jsonl", "README.md"):
        (tmp_path / name).write_bytes(LINE)
    names = [name for name, _, _ in found([tmp_path], tmp_path)]
    assert names == [f"{tmp_path.name}/{name}" for name in ("a.parquet", "b.jsonl", "c.jsonl.zst")]


def test_a_folder_without_data_says_what_is_in_it(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match=r"holds no \.jsonl, .* files; it has the folders data"):
        found([tmp_path], tmp_path)


def test_a_saved_dataset(tmp_path):
    rows = [{"prompt": str(i), "completion": "x"} for i in range(10)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "maths", num_shards=3)
    assert found([tmp_path / "maths"], tmp_path) == [
        (f"maths/data-0000{i}-of-00003.arrow", "maths", "arrow") for i in range(3)
    ]


def test_splits_are_named_and_one_alone_is_taken(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "one")
    with pytest.raises(UsageError) as caught:
        found([tmp_path / "two"], tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'two'} holds the splits train, test: give one of them, such as {tmp_path / 'two' / 'train'}"
    )
    file = "train/data-00000-of-00001.arrow"
    assert found([tmp_path / "two" / "train"], tmp_path) == [(file, "two", "arrow")]
    assert found([tmp_path / "one"], tmp_path) == [(file, "one", "arrow")]


@pytest.mark.parametrize(
    "state", ["{", "{}", '{"_data_files": []}', '{"_data_files": [{"filename": 3}]}', "[]"]
)
def test_a_damaged_dataset_is_one_line(tmp_path, state):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(PearError, match=r"state\.json lists no data"):
        found([tmp_path], tmp_path)


def test_a_dataset_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "secret").write_bytes(LINE)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "dataset_info.json").write_text("{}")
    (inner / "state.json").write_text('{"_data_files": [{"filename": "../secret"}]}')
    with pytest.raises(PearError, match=f"cannot read {inner / 'secret'}"):
        found([inner], tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no such file: .*gone\.jsonl"):
        found([tmp_path / "gone.jsonl"], tmp_path)


def test_standard_input_is_spooled_privately_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(LINE))))
    with opened_inputs(["-"], tmp_path) as (source,):
        assert (source.name, source.source, source.kind) == ("stdin", "stdin", "jsonl.gz")
        assert stat.S_IMODE(source.path.stat().st_mode) == 0o600
        assert source.path.parent == tmp_path
        assert gzip.decompress(source.path.read_bytes()) == LINE
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_spooled_too(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(LINE,)).start()
    spool = tmp_path / "spool"
    spool.mkdir()
    with opened_inputs([str(pipe)], spool) as (source,):
        assert source.path.read_bytes() == LINE
        assert source.name == "pipe"
    assert list(spool.iterdir()) == []


def test_checksums(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 3_000_000)
    counts = []
    assert sha256_of(path, counts.append) == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert sum(counts) == 3_000_000
