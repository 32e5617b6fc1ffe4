"""Rows, ids and files that are refused: where, why, and what becomes of the rest."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from ingest_cases import TURNS, examples, write_lines

from pear_data.errors import PearError, UsageError
from pear_data.store import open_store

BAD_LINES = {
    b'{"messages": "\xff"}': "not UTF-8: byte 0xff at offset 14",
    b'{"messages": "\\ud800"}': "a lone surrogate \\ud800: it is no character",
    b'{"messages": NaN}': "NaN is not JSON",
    b'{"messages": 1, "messages": 2}': "the key 'messages' appears twice",
    b"[" * 100_000: "nested deeper than 100 levels (raw row cut to 65,536 of 100,000 bytes)",
    b"[1]": "not a JSON object but a list",
    b"{}": "field 'messages' is missing or null",
    b'{"messages": [{"role": "user", "content": "q"}]}': (
        "the conversation has no assistant turn: there is nothing to score"
    ),
    b'{"messages": [{"role": "who", "content": "q"}]}': "turn 1 has the unknown role 'who'",
    b'{"prompt": "q", "completion": "a"}': "field 'messages' is missing or null",
    b"<html>": "not JSON: Expecting value at character 1",
    b"\x00\x01": "not JSON: Expecting value at character 1",
}


def test_bad_rows_are_quarantined_and_the_job_goes_on(tmp_path, run, read, quarantine):
    good = json.dumps({"messages": TURNS}).encode()
    lines = [line for bad in BAD_LINES for line in (bad, good)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\r\n".join(lines))
    outcome, _ = run(path)
    assert outcome.rejected == len(BAD_LINES)
    assert [row["sample_id"] for row in read()] == [f"a.jsonl:{2 * n + 2}" for n in range(len(BAD_LINES))]
    assert quarantine() == [
        ("a.jsonl", 2 * index + 1, reason, line[:65536])
        for index, (line, reason) in enumerate(BAD_LINES.items())
    ]


def test_max_bad_stops_the_job_and_keeps_what_is_committed(tmp_path, run, read):
    path = tmp_path / "a.jsonl"
    write_lines(path, examples(20))
    with path.open("a") as file:
        file.write("bad\n" * 3)
    with pytest.raises(PearError) as caught:
        run(path, max_bad=2, shard_tokens=500)
    assert str(caught.value) == (
        "3 rows rejected, more than --max-bad 2 allows; the last is a.jsonl:23: "
        "not JSON: Expecting value at character 1"
    )
    store = open_store(tmp_path / "store")
    assert store.stage("corpus").shards
    assert not store.stage("corpus").complete
    outcome, _ = run(path, max_bad=3, shard_tokens=500)
    assert outcome.rejected == 3
    assert len(read()) == 20


@pytest.mark.parametrize("allowed", [0, 1, 2, 6, 7, 8])
def test_max_bad_is_exact_across_batches_shards_and_resumed_runs(tmp_path, run, read, allowed):
    bad = {2, 3, 9, 10, 11, 30, 31}
    lines = [json.dumps(row) for row in examples(31 - len(bad))]
    for number in sorted(bad):
        lines.insert(number - 1, "bad")
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    if allowed >= len(bad):
        assert run(path, max_bad=allowed, shard_tokens=500)[0].rejected == len(bad)
    else:
        culprit = sorted(bad)[allowed]
        message = f"{allowed + 1} rows rejected, more than --max-bad {allowed} allows; the last is a.jsonl:{culprit}: "
        for _ in range(2):  # the second run goes on behind the shards of the first
            with pytest.raises(PearError) as caught:
                run(path, max_bad=allowed, shard_tokens=500)
            assert str(caught.value).startswith(message)
    # A corpus that is there already is held to the bound too.
    run(path, shard_tokens=500)
    if allowed < len(bad):
        with pytest.raises(
            PearError, match=f"7 rows rejected, more than --max-bad {allowed} allows .*quarantine list"
        ):
            run(path, max_bad=allowed, shard_tokens=500)
    assert len(read()) == 31 - len(bad)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the corpus has no rows (read: a.jsonl): give files that hold some"),
        (b"\n\n", "the corpus has no rows (read: a.jsonl): give files that hold some"),
        (
            b"bad\n[]\n",
            "the corpus has no usable row (a.jsonl:1: not JSON: Expecting value at character 1): "
            "give JSON Lines (one object a line), Parquet or a saved dataset",
        ),
    ],
)
def test_a_corpus_without_a_usable_row_is_refused(tmp_path, run, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(PearError) as caught:
        run(path)
    assert str(caught.value) == message
    assert not open_store(tmp_path / "store").stage("corpus").complete


def test_an_unknown_layout_is_one_line(tmp_path, run):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "plain", "n\x1b[2J": 1}])
    with pytest.raises(UsageError) as caught:
        run(path)
    assert str(caught.value) == (
        "a.jsonl: no row fits a layout; fields of row 1: 'text', 'n\\x1b[2J'; layouts known: input_ids+loss_mask; "
        "input_ids+labels; messages; conversations; prompt+completion; instruction+output; problem+solution; others "
        "need --prompt-field and --response-field"
    )
    with pytest.raises(UsageError, match="no row has the fields text, answer; fields of row 1"):
        run(path, prompt_field="text", response_field="answer")
    with pytest.raises(UsageError, match="--prompt-field and --response-field go together"):
        run(path, prompt_field="text")


def test_a_misspelt_field_is_an_error_not_a_full_quarantine(tmp_path, run):
    path = write_lines(tmp_path / "a.jsonl", examples(5))
    with pytest.raises(UsageError, match="a.jsonl: no row has the fields idd; fields of row 1: 'messages'"):
        run(path, id_field="idd")


def test_each_file_has_its_own_layout_and_every_row_must_fit_it(tmp_path, run, read, quarantine):
    a = write_lines(tmp_path / "a.jsonl", [*examples(2), {"prompt": "q", "completion": "a"}])
    b = write_lines(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a"}, *examples(1)])
    run(a, b)
    assert [row["sample_id"] for row in read()] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert [entry[:3] for entry in quarantine()] == [
        ("a.jsonl", 3, "field 'messages' is missing or null"),
        ("b.jsonl", 2, "field 'prompt' is missing or null"),
    ]


@pytest.mark.parametrize("column", [[4, 5], [None, None], None])
def test_files_of_mixed_schemas_are_refused_not_filled_or_cast(tmp_path, run, column):
    pq.write_table(pa.table({"prompt": ["q", "r"], "completion": ["a", "b"]}), tmp_path / "a.parquet")
    other = {"prompt": ["q", "r"]} | ({"completion": column} if column else {})
    pq.write_table(pa.table(other), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet: no row fits a layout; fields of row 1: 'prompt'"):
        run(tmp_path)


def test_one_odd_row_in_front_does_not_stop_the_job(tmp_path, run, read, quarantine):
    run(write_lines(tmp_path / "a.jsonl", [{"version": 2}, *examples(2)]))
    assert len(read()) == 2
    assert quarantine()[0][:3] == ("a.jsonl", 1, "field 'messages' is missing or null")


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
def test_a_damaged_file_is_one_line(tmp_path, run, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(examples(50)), path)
    else:
        pack = {"gz": gzip.compress, "zst": zstandard.compress}[kind]
        path.write_bytes(pack(write_lines(tmp_path / "lines", examples(50)).read_bytes()))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        PearError, match=rf"a\.{kind} is damaged or unreadable \(.*\): get a whole copy of it"
    ) as caught:
        run(path)
    assert "\n" not in str(caught.value)


def test_an_id_given_twice_is_refused_at_once(tmp_path, run):
    rows = [{**row, "id": n} for n, row in enumerate(examples(5))]
    path = write_lines(tmp_path / "a.jsonl", [*rows, {**rows[2], "messages": TURNS}])
    with pytest.raises(PearError) as caught:
        run(path)
    assert str(caught.value) == (
        "the sample id '2' occurs twice, at a.jsonl:3 and at a.jsonl:6: take one out, name another field with "
        "--id-field, or number the rows with --id-field :row (then with a new --store, if this one has shards)"
    )


def test_an_id_given_twice_in_different_shards_is_refused_before_the_corpus_is_complete(tmp_path, run):
    rows = [{**row, "id": n} for n, row in enumerate(examples(30))]
    path = write_lines(tmp_path / "a.jsonl", [*rows, rows[1]])
    for _ in range(2):  # the second run goes on where the first stopped
        with pytest.raises(PearError) as caught:
            run(path, shard_tokens=500)
        shards = open_store(tmp_path / "store").stage("corpus").shards
        assert len(shards) > 2
        assert (
            f"'1' occurs twice, at row 2 of corpus/part-00000.parquet and at row {shards[-1].rows} of "
            in str(caught.value)
        )
        assert not open_store(tmp_path / "store").stage("corpus").complete
    assert not list((tmp_path / "store").glob("*.tmp"))


def test_row_numbers_keep_equal_ids_apart(tmp_path, run, read):
    rows = [{**row, "id": "same"} for row in examples(4)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(PearError, match="occurs twice"):
        run(path)
    _, said = run(path, id_field=":row")
    assert [row["sample_id"] for row in read()] == [f"a.jsonl:{n}" for n in range(1, 5)]
    assert "a.jsonl: layout messages, ids from row numbers" in said
