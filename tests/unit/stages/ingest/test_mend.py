"""The quarantine of a corpus, listed, mended and taken in; nothing that was fine before is touched."""

from __future__ import annotations

import io
import json

import datasets
import pyarrow.parquet as pq
import pytest
from ingest_cases import TURNS, KilledError, chat, examples, expected_tokens, rendered, write_lines

from pear_data.errors import PearError, UsageError
from pear_data.progress import Silent
from pear_data.stages.mend import mend
from pear_data.stages.quarantine import write_quarantine
from pear_data.store import open_store, writable_store

PADDED = b'  {"id": 7, "messages": [{"role": "who", "content": "\xc3\xa9"}]}\t'
BAD = {2: b"{bad", 3: PADDED, 5: b'\xff\x00{"a": 1}'}


@pytest.fixture
def corpus(tmp_path):
    """Six lines, three of them bad; the good ones have ids."""
    lines = [json.dumps({**row, "id": n}).encode() for n, row in enumerate(examples(3))]
    for number, line in BAD.items():
        lines.insert(number - 1, line)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\r\n".join(lines) + b"\n")
    return path


def listed(folder, form="jsonl", **options):
    sink = io.BytesIO()
    note = write_quarantine(open_store(folder), form, sink, **options)
    if form != "jsonl":
        return sink.getvalue(), note
    return [json.loads(line) for line in sink.getvalue().splitlines()], note


def retry(tmp_path, rows, said=None):
    path = write_lines(tmp_path / "mended.jsonl", rows)
    with writable_store(tmp_path / "store") as store:
        return mend(store, path, said or Silent())


def mended(tmp_path):
    """What the quarantine lists, the first two rows mended: one as text, one as an object."""
    rows, _ = listed(tmp_path / "store")
    rows[0]["raw"] = json.dumps({"id": "new", "messages": TURNS})
    rows[1]["raw"] = {"messages": chat(("user", "q"), ("assistant", "é")), "id": 7, "source": "mine"}
    return rows


def test_rows_are_listed_as_they_stood_in_the_file(tmp_path, corpus, run):
    run(corpus)
    rows, note = listed(tmp_path / "store")
    assert note == "3 rows in quarantine: 3 of corpus"
    assert [(row["stage"], row["input"], row["row"]) for row in rows] == [
        ("corpus", "a.jsonl", number) for number in BAD
    ]
    assert [row["raw"] for row in rows] == ["{bad", PADDED.decode(), None]
    assert [row["raw_base64"] for row in rows] == [None, None, "/wB7ImEiOiAxfQ=="]
    assert rows[1]["reason"] == "turn 1 has the unknown role 'who'"
    table = pq.read_table(io.BytesIO(listed(tmp_path / "store", "parquet")[0]))
    assert table["raw"].to_pylist() == list(BAD.values())
    shown, _ = listed(tmp_path / "store", "table")
    assert b"\\xff" in shown
    assert b"\x00" not in shown
    assert listed(tmp_path / "store", stage="corpus")[0] == rows
    with pytest.raises(UsageError, match="has no scores/x: it has corpus"):
        listed(tmp_path / "store", stage="scores/x")


def test_mended_rows_become_a_shard_behind_the_others(tmp_path, corpus, run, read, tokenizer):
    run(corpus, shard_tokens=60)
    before = open_store(tmp_path / "store").stage("corpus").shards
    rows = read()
    corpus.unlink()  # neither the corpus nor the model is needed again
    outcome = retry(tmp_path, mended(tmp_path))
    assert outcome.summary == (
        "corpus: 2 rows mended; 1 of those given are still rejected; 1 rows are left in quarantine; run `score` and "
        "`weight` again, which do the new rows alone"
    )
    assert outcome.rejected == 1
    stage = open_store(tmp_path / "store").stage("corpus")
    assert stage.complete
    assert stage.shards[: len(before)] == before
    assert read()[: len(rows)] == rows
    new, named = read()[len(rows) :]
    assert [(row["sample_id"], row["source"]) for row in (new, named)] == [("new", "a"), ("7", "mine")]
    ids, mask = expected_tokens(rendered(TURNS), tokenizer)
    assert (new["input_ids"], new["loss_mask"]) == (ids, mask)
    assert stage.decisions["counts"]["rows read"] == 6
    left, note = listed(tmp_path / "store")
    assert [row["row"] for row in left] == [5]
    assert note == "1 rows in quarantine: 1 of corpus"


def test_given_again_nothing_is_taken_twice(tmp_path, corpus, run, read):
    run(corpus)
    rows = mended(tmp_path)
    retry(tmp_path, rows)
    once = read()
    assert retry(tmp_path, rows).summary.startswith("corpus: 0 rows mended; 1 of those given")
    assert read() == once


def test_the_corpus_given_again_is_complete_and_its_exit_counts_what_is_left(tmp_path, corpus, run):
    run(corpus)
    retry(tmp_path, mended(tmp_path))
    outcome, said = run(corpus)
    assert outcome.rejected == 1
    assert "complete already" in said[0]


def test_a_row_without_an_id_has_that_of_its_place(tmp_path, run, read):
    run(write_lines(tmp_path / "a.jsonl", [*examples(1), {"no": 1}]))
    retry(tmp_path, [{"input": "a.jsonl", "row": 2, "raw": {"messages": TURNS}}])
    assert [row["sample_id"] for row in read()] == ["a.jsonl:1", "a.jsonl:2"]


@pytest.mark.parametrize("where", ["corpus", "mended"])
def test_an_id_that_the_corpus_has_is_refused(tmp_path, corpus, run, read, where):
    run(corpus)
    before = read()
    rows = mended(tmp_path)
    rows[1]["raw"]["id"] = 1 if where == "corpus" else "new"
    with pytest.raises(PearError, match="occurs twice, at .* and at a.jsonl:3"):
        retry(tmp_path, rows)
    assert read() == before
    assert len(listed(tmp_path / "store")[0]) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "a.jsonl", "row": 4, "raw": "{}"}', "1: row 4 of 'a.jsonl' was never in quarantine"),
        ('{"input": "../x", "row": 2, "raw": "{}"}', "1: row 2 of '../x' was never in quarantine"),
        ('{"row": 2, "raw": "{}"}', "1: without 'input' and 'row': a line is "),
        ('{"input": "a.jsonl", "row": true}', "1: without 'input' and 'row': a line is "),
        ("nonsense", "1: not JSON: Expecting value at character 1: a line is "),
        (
            '{"input": "a.jsonl", "row": 2}\n{"input": "a.jsonl", "row": 2}',
            "2: row 2 of 'a.jsonl' is given twice",
        ),
    ],
)
def test_what_is_no_list_of_quarantined_rows_is_refused_whole(tmp_path, corpus, run, read, line, message):
    run(corpus)
    before = read()
    path = tmp_path / "mended.jsonl"
    path.write_text(line)
    with writable_store(tmp_path / "store") as store, pytest.raises(UsageError) as caught:
        mend(store, path, Silent())
    assert f"mended.jsonl:{message}" in str(caught.value)
    assert read() == before


def test_killed_at_any_write_nothing_is_lost(tmp_path, corpus, run, read, die_at):
    run(corpus)
    rows = mended(tmp_path)
    writes, before = 0, read()
    while True:
        writes += 1
        die_at(writes)
        try:
            retry(tmp_path, rows)
            break
        except KilledError:
            die_at(None)
            assert len(read()) in (len(before), len(before) + 2)
            assert len(listed(tmp_path / "store")[0]) == 3 - (len(read()) - len(before))
    assert writes > 4
    assert [row["sample_id"] for row in read()[len(before) :]] == ["new", "7"]


def test_rows_of_a_lost_shard_are_in_quarantine_again(tmp_path, corpus, run, read):
    run(corpus)
    rows = mended(tmp_path)
    retry(tmp_path, rows)
    whole = read()
    with writable_store(tmp_path / "store") as store:
        store.begin("scores/initial", {})
        for shard in store.stage("corpus").shards:
            store.commit("scores/initial", shard)
    (tmp_path / "store" / "corpus" / "part-00001.parquet").unlink()
    outcome, said = run(corpus)
    assert outcome.rejected == 3
    assert (
        "rows mended there are in quarantine again: give them to `pear-data quarantine retry` again" in said
    )
    (left,) = open_store(tmp_path / "store").stage("scores/initial").shards
    assert left.name == "part-00000"
    retry(tmp_path, rows)
    assert read() == whole


def test_a_whole_unreadable_file_is_mended_by_the_layout_of_its_first_mended_row(tmp_path, run, read):
    (tmp_path / "b.jsonl").write_text("<html>\n</html>\n")
    run(write_lines(tmp_path / "a.jsonl", examples(1)), tmp_path / "b.jsonl")
    outcome = retry(
        tmp_path,
        [
            {"input": "b.jsonl", "row": 1, "raw": {"prompt": "q", "completion": "a"}},
            {"input": "b.jsonl", "row": 2, "raw": {"messages": TURNS}},
        ],
    )
    assert outcome.rejected == 1
    assert [row["sample_id"] for row in read()] == ["a.jsonl:1", "b.jsonl:1"]


def test_rows_of_a_saved_dataset_say_their_source(tmp_path, run, read):
    datasets.Dataset.from_list([*examples(1), {"messages": []}]).save_to_disk(tmp_path / "maths")
    run(tmp_path / "maths")
    place = {"input": "maths/data-00000-of-00001.arrow", "row": 2}
    assert retry(tmp_path, [{**place, "raw": {"messages": TURNS}}]).rejected == 1
    assert retry(tmp_path, [{**place, "raw": {"messages": TURNS, "source": "maths"}}]).rejected == 0
    assert [row["source"] for row in read()] == ["maths", "maths"]


def test_token_ids_and_all_turns_are_mended_as_they_were_ingested(tmp_path, run, read, rewriting_tokenizer):
    run(write_lines(tmp_path / "t.jsonl", [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1]}]))
    outcome = retry(
        tmp_path, [{"input": "t.jsonl", "row": 2, "raw": {"input_ids": [3, 4], "labels": [-100, 4]}}]
    )
    assert (outcome.rejected, [row["input_ids"] for row in read()]) == (0, [[1, 2], [3, 4]])
    turns = chat(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    turns[1]["reasoning_content"] = "dropped once a later turn follows"
    path = write_lines(tmp_path / "m.jsonl", [{"messages": turns}, {"messages": []}])
    run(path, store="all", tokenizer=rewriting_tokenizer, turns="all")
    with writable_store(tmp_path / "all") as store:
        rows = write_lines(tmp_path / "rows", [{"input": "m.jsonl", "row": 2, "raw": {"messages": turns}}])
        mend(store, rows, Silent())
    first, second, third, fourth = read("all")
    assert (third["input_ids"], fourth["input_ids"]) == (first["input_ids"], second["input_ids"])
