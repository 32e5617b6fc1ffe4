"""Query results in every format: the same values, streamed, harmless to a terminal."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from pear_data.cli.entry import run
from pear_data.cli.terminal import PrintableSink
from pear_data.errors import PearError, UsageError
from pear_data.stages import sql
from pear_data.stages.sql import write_query
from pear_data.store import open_store
from pear_data.store.manifest import fingerprint


@pytest.fixture
def store(make_store, samples):
    return open_store(make_store(samples))


def written(store, query, form):
    sink = io.BytesIO()
    note = write_query(store, query, form, sink)
    return sink.getvalue(), note


def json_rows(store, query):
    lines, _ = written(store, query, "jsonl")
    rows = [json.loads(line) for line in lines.splitlines()]
    array, _ = written(store, query, "json")
    assert json.loads(array) == rows
    return rows


def test_json_holds_numbers_lists_and_text(store, samples):
    rows = json_rows(
        store, "select sample_id, logprobs, sum(num_scored) over () as total from scores order by 1, policy"
    )
    assert len(rows) == 2 * len(samples)
    by_id = {sample.sample_id: sample for sample in samples}
    assert rows[0]["logprobs"] == pytest.approx(by_id["s0"].behavior.tolist())
    assert {row["total"] for row in rows} == {2 * sum(int(sample.loss_mask.sum()) for sample in samples)}


def test_json_of_awkward_values(store):
    query = """select 'nan'::float as nan, 'inf'::double as inf, 1.25::decimal(9, 2) as price, 3::hugeint as whole,
        170141183460469231731687303715884105727::hugeint as huge, null as nothing, date '2026-01-02' as day,
        {'a': [1, null]} as nested, E'a\\n"\\x1b[2J"' as text"""
    assert json_rows(store, query) == [
        {
            "nan": None,
            "inf": None,
            "price": 1.25,
            "whole": 3,
            "huge": "170141183460469231731687303715884105727",
            "nothing": None,
            "day": "2026-01-02",
            "nested": {"a": [1, None]},
            "text": 'a\n"\x1b[2J"',
        }
    ]


def test_csv_holds_lists_as_json(store):
    text, _ = written(
        store, "select [1, null] as l, {'a': 'x,\"y'} as s, null::int[] as n, 'a,\nb' as t", "csv"
    )
    rows = list(csv.DictReader(io.StringIO(text.decode())))
    assert rows == [{"l": "[1,null]", "s": '{"a":"x,\\"y"}', "n": "", "t": "a,\nb"}]


def test_columns_of_one_name_are_shown_apart_or_refused(store):
    text, _ = written(store, "select 1 as a, 2 as a", "table")
    assert "│ 1 │ 2 │" in text.decode()
    for form in ("csv", "json", "jsonl", "parquet"):
        with pytest.raises(UsageError, match="two columns are called 'a'"):
            written(store, "select 1 as a, 2 as a", form)


def test_types_no_file_holds_are_refused(store):
    for form in ("csv", "json", "jsonl", "parquet"):
        with pytest.raises(UsageError, match="cast it in the query"):
            written(store, "select interval 1 day as i", form)


def test_a_stage_of_other_log_probs_is_noted(store):
    store.stage("scores/initial").shards[0].inputs["corpus"] = "0" * 64
    _, note = written(store, "select 1 as a", "jsonl")
    assert "scores/initial" in note
    assert "was not made from the present corpus" in note


def test_a_weighting_without_summaries_is_left_out_and_noted(store):
    settings = {"level": "block"}
    store.manifest.stages["weights/old"] = store.stage("scores/initial").model_copy(
        update={"settings": settings, "fingerprint": fingerprint(settings)}
    )
    lines, note = written(store, "select count(*) as n from weights", "jsonl")
    assert lines == b'{"n":0}\n'
    assert note.startswith(f"weights/old in {store.path} is left out")
    assert "pear-data migrate" in note


def test_what_goes_to_a_terminal_cannot_steer_it():
    sink = io.BytesIO()
    PrintableSink(sink).write("a,\x1b[2Jé\x9b\n".encode())
    assert sink.getvalue().decode() == "a,[2Jé\n"


def test_no_rows(store):
    query = "select sample_id, num_scored, input_ids from corpus where false"
    assert written(store, query, "json")[0] == b"[]\n"
    assert written(store, query, "jsonl")[0] == b""
    assert written(store, query, "csv")[0] == b"sample_id,num_scored,input_ids\n"
    assert b"sample_id" in written(store, query, "table")[0]
    assert pq.read_table(io.BytesIO(written(store, query, "parquet")[0])).num_rows == 0


def test_many_batches_are_all_written(store):
    query = "select range as n from range(10000) order by n"
    for form, read in {
        "csv": lambda text: [int(line) for line in text.decode().split()[1:]],
        "json": lambda text: [row["n"] for row in json.loads(text)],
        "parquet": lambda data: pq.read_table(io.BytesIO(data))["n"].to_pylist(),
    }.items():
        assert read(written(store, query, form)[0]) == list(range(10000))


def test_rows_are_written_while_they_are_computed(store):
    class EnoughError(Exception):
        pass

    class Sink(io.BytesIO):
        def write(self, data):
            if self.tell() > 100_000:
                raise EnoughError
            assert len(data) < 1_000_000
            return super().write(data)

    # Ten billion rows: whoever waits for the last one waits for long.
    with pytest.raises(EnoughError):
        write_query(store, "select range from range(10000000000)", "jsonl", Sink())


def test_a_table_is_harmless_and_has_an_end(store):
    text, note = written(
        store, r"select E'[red]\x1b[2J\x07' || chr(8238) || E'evil\nline' as token from range(700)", "table"
    )
    shown = text.decode()
    assert "[red][2Jevil⏎line" in shown
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    assert shown.count("evil") == sql.TABLE_ROWS
    assert "first 500 rows" in note
    assert written(store, "select 1", "table")[1] is None


def test_long_cells_are_cut_in_tables_only(store):
    assert "…" in written(store, "select range(1000) as l", "table")[0].decode()
    assert json_rows(store, "select range(1000) as l")[0]["l"][-1] == 999


def test_columns_no_text_format_can_hold(store):
    with pytest.raises(UsageError, match="column 'b' is binary.*cast it"):
        written(store, "select 'x'::blob as b", "jsonl")
    with pytest.raises(UsageError, match="column 'i' is .*interval"):
        written(store, "select [interval 1 day] as i", "csv")
    with pytest.raises(UsageError, match="two columns are called 'a'"):
        written(store, "select 1 as a, 2 as a", "json")
    assert pq.read_table(io.BytesIO(written(store, "select 'x'::blob as b", "parquet")[0]))[
        "b"
    ].to_pylist() == [b"x"]


def test_command_line_formats_and_files(store, tmp_path, capsys, monkeypatch):
    where = ["--store", str(store.path)]
    assert run(["sql", "select 1 as a", *where]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    out = tmp_path / "out.csv"
    assert run(["sql", "select 1 as a", "-o", str(out), *where]) == 0
    assert out.read_text() == "a\n1\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("select 2 as a"))
    assert run(["sql", "-", "--format", "csv", *where]) == 0
    assert capsys.readouterr().out == "a\n2\n"
    assert run(["sql", "drop view corpus", *where]) == 2
    assert run(["sql", "from nope", *where]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line[:6] for line in errors] == ["Error:", "Error:"]


def test_a_failed_query_leaves_no_file(store, tmp_path):
    out = tmp_path / "out.jsonl"
    query = "select case when range > 50000 then error('late') end as a from range(100000)"
    assert run(["sql", query, "-o", str(out), "--store", str(store.path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_whoever_reads_a_part_is_no_error(store):
    command = [
        sys.executable,
        "-m",
        "pear_data",
        "sql",
        "select range from range(10000000)",
        "--store",
        str(store.path),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'{"range":0}\n'
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(timeout=60)


def test_the_timeout_reaches_the_query(store):
    with pytest.raises(PearError, match=r"longer than 0\.2 s"):
        write_query(
            store,
            "select count(*) from range(1000000000) a, range(1000000000)",
            "json",
            io.BytesIO(),
            timeout=0.2,
        )
