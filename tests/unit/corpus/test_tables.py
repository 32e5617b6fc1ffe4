from __future__ import annotations

import datetime
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_data.corpus import tables
from pear_data.corpus.records import Rejected
from pear_data.corpus.tables import read_arrow, read_parquet
from pear_data.errors import PearError

COUNT = 1000


def make_table():
    return pa.table(
        {
            "id": pa.array(range(COUNT)),
            "messages": pa.array(
                [
                    [
                        {"role": "user", "content": f"question {i}", "name": None},
                        {"role": "assistant", "content": "é" * (i % 7), "name": "me" if i % 3 else None},
                    ]
                    for i in range(COUNT)
                ]
            ),
            "ids": pa.array(
                [list(range(i % 5)) if i % 11 else None for i in range(COUNT)], pa.list_(pa.int32())
            ),
            "mask": pa.array([[True, False]] * COUNT, pa.large_list(pa.bool_())),
            "source": pa.array(["one", "two"] * (COUNT // 2)).dictionary_encode(),
            "score": pa.array([None if i % 2 else i / 4 for i in range(COUNT)]),
        }
    )


def plain(row):
    """A row with lists for arrays."""
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in row.fields.items()
    }


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def write(path, kind, table):
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=300)
    else:
        opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with opened(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)


READ = {"parquet": read_parquet, "stream": read_arrow, "file": read_arrow}


@pytest.mark.parametrize("kind", READ)
def test_rows_are_those_of_the_table_less_the_fill_of_structs(tmp_path, kind):
    table = make_table()
    write(tmp_path / "rows", kind, table)
    rows = list(READ[kind](tmp_path / "rows", 0))
    assert [row.number for row in rows] == list(range(1, COUNT + 1))
    assert [plain(row) for row in rows] == without_nulls(table.to_pylist())
    assert isinstance(rows[1].fields["ids"], np.ndarray), "lists of numbers never become Python objects"


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("skip", [1, 255, 256, 299, 300, 301, 999, 1000, 5000])
def test_reading_goes_on_anywhere(tmp_path, kind, skip):
    write(tmp_path / "rows", kind, make_table())
    rows = list(READ[kind](tmp_path / "rows", 0))
    rest = list(READ[kind](tmp_path / "rows", skip))
    assert [(row.number, plain(row)) for row in rest] == [(row.number, plain(row)) for row in rows[skip:]]


def test_skipped_row_groups_are_not_read(tmp_path, monkeypatch):
    write(tmp_path / "rows", "parquet", make_table())
    groups = []
    read = tables._group_batches
    monkeypatch.setattr(
        tables,
        "_group_batches",
        lambda path, metadata, group, paths: groups.append(group) or read(path, metadata, group, paths),
    )
    assert next(read_parquet(tmp_path / "rows", 650)).number == 651
    assert groups == [2]


def test_text_that_is_not_utf8_rejects_its_row_only(tmp_path):
    texts = pa.array([b"ok"] * 500, pa.binary()).to_pylist()
    texts[123] = b"\xff\xfe"
    column = pa.Array.from_buffers(pa.string(), 500, pa.array(texts, pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "rows", store_schema=False)
    rows = list(read_parquet(tmp_path / "rows", 0))
    assert rows[123] == Rejected(124, "holds text that is not UTF-8", b'{"text": "fffe"}')
    assert sum(isinstance(row, Rejected) for row in rows) == 1
    assert [row.number for row in rows] == list(range(1, 501))


def test_values_python_has_not_become_text(tmp_path):
    moment = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", "UTC"))
    table = pa.table(
        {
            "at": moment,
            "day": [datetime.date(2026, 1, 2)],
            "map": pa.array([[("a", 1)]], pa.map_("str", "i8")),
        }
    )
    pq.write_table(table, tmp_path / "rows")
    (row,) = read_parquet(tmp_path / "rows", 0)
    assert json.loads(row.as_json()) == {
        "at": "2023-11-14 22:13:20.123456789Z",
        "day": "2026-01-02",
        "map": [["a", 1]],
    }


@pytest.mark.parametrize("kind", READ)
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    write(tmp_path / "rows", kind, pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]))
    with pytest.raises(PearError, match="two columns named 'a': rename one"):
        list(READ[kind](tmp_path / "rows", 0))


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_file_cut_short_is_an_error(tmp_path, kind, share):
    path = tmp_path / "rows"
    write(path, kind, make_table())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises((OSError, pa.ArrowException)):
        list(READ[kind](path, 0))


def repeated(text, count):
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))


def bombs():
    """Tables of a few kilobytes as Parquet that decode to tens of gigabytes."""
    one_list = pa.array([0, 1_000_000], pa.int32())
    column = repeated("x" * 20_000, 1_000_000)
    turns = pa.StructArray.from_arrays([column, column], ["role", "content"])
    return {
        "a million long rows": pa.table({"prompt": column}),
        "a row with a million texts": pa.table({"prompt": pa.ListArray.from_arrays(one_list, column)}),
        "a row with a million turns": pa.table({"messages": pa.ListArray.from_arrays(one_list, turns)}),
    }


READ_UNDER_LIMIT = """
import itertools, resource, sys
from pathlib import Path
from pear_data.corpus.tables import read_parquet
resource.setrlimit(resource.RLIMIT_AS, (2 << 30,) * 2)
for row in itertools.islice(read_parquet(Path(sys.argv[1]), 0), 600):
    last = row
print(row.number, getattr(row, "reason", ""))
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a million long rows", "600 "),
        ("a row with a million texts", "1 decodes to 20,000,000,000 bytes, over the limit of 67,108,864"),
        ("a row with a million turns", "1 decodes to 40,000,000,000 bytes, over the limit of 67,108,864"),
    ],
)
def test_a_parquet_bomb_is_read_in_bounded_memory(tmp_path, name, expected):
    path = tmp_path / "bomb.parquet"
    pq.write_table(bombs()[name], path, store_schema=False)
    assert path.stat().st_size < 50_000
    done = subprocess.run([sys.executable, "-c", READ_UNDER_LIMIT, str(path)], capture_output=True, text=True)
    assert done.stdout.rstrip("\n") == expected, done.stderr


def test_rows_whose_mean_size_is_over_the_cap_are_refused_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": ["x" * 3000, "y"]}), path)
    with pytest.raises(
        PearError, match=r"row group 0 holds [\d,]+ bytes a row, over the limit of 1,000: take"
    ):
        list(read_parquet(path, 0))
