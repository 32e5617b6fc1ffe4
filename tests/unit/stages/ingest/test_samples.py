"""Every layout through the whole stage: ids, masks, names, and what is said about them."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from ingest_cases import CHATML, TURNS, chat, examples, expected_tokens, rendered, write_lines
from transformers import AutoTokenizer

from pear_data.errors import UsageError
from pear_data.schema import VOCABULARY
from pear_data.store import open_store

GPT = [
    {"from": "system", "value": "be brief"},
    {"from": "human", "value": "q"},
    {"from": "gpt", "value": "a"},
    {"from": "human", "value": "q2"},
    {"from": "gpt", "value": "a2"},
]
LAYOUTS = {
    "messages": ({"messages": TURNS}, TURNS),
    "multi-turn": (
        {
            "messages": chat(
                ("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "é"), ("assistant", "")
            )
        },
        chat(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "é"), ("assistant", "")),
    ),
    "parts": (
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]},
        TURNS,
    ),
    "reasoning": (
        {"messages": [TURNS[0], {"role": "assistant", "content": "a", "reasoning_content": "why"}]},
        chat(("user", "q"), ("assistant", "<think>why</think>a")),
    ),
    "tool turns": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "a"},
            ]
        },
        chat(
            ("user", "q"),
            ("assistant", '{"name": "f", "arguments": {"x": 1}}'),
            ("tool", "3"),
            ("assistant", "a"),
        ),
    ),
    "conversations": (
        {"conversations": GPT},
        chat(("system", "be brief"), ("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")),
    ),
    "prompt+completion": ({"prompt": "q", "completion": "a"}, TURNS),
    "prompt+completion of turns": ({"prompt": [TURNS[0]], "completion": [TURNS[1]]}, TURNS),
    "instruction+output": (
        {"instruction": "q", "input": "i", "output": "a"},
        chat(("user", "q\ni"), ("assistant", "a")),
    ),
    "problem+solution": ({"problem": "q", "solution": "a"}, TURNS),
}


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "dataset"])
@pytest.mark.parametrize(("row", "messages"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_from_every_kind_of_file(tmp_path, run, read, tokenizer, kind, row, messages):
    rows = [row, {**row, "extra": None}, {**row, "extra": "x"}]
    path = tmp_path / "my.corpus"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{"extra": None, **each} for each in rows]), path)
    elif kind == "dataset":
        datasets.Dataset.from_list([{"extra": None, **each} for each in rows]).save_to_disk(path)
    else:
        pack = {"jsonl": bytes, "gz": gzip.compress, "zst": zstandard.compress}[kind]
        path.write_bytes(pack(write_lines(tmp_path / "lines", rows).read_bytes()))
    outcome, _ = run(path)
    assert outcome.rejected == 0
    ids, mask = expected_tokens(rendered(messages), tokenizer)
    name = "my.corpus/data-00000-of-00001.arrow" if kind == "dataset" else "my.corpus"
    for number, got in enumerate(read(), 1):
        assert (got["input_ids"], got["loss_mask"]) == (ids, mask)
        assert (got["sample_id"], got["source"], got["label"]) == (f"{name}:{number}", "my.corpus", 1)
        record = json.loads(got["record"])
        if kind in ("jsonl", "gz", "zst"):
            assert record == rows[number - 1]
        else:
            assert record.get("extra") == rows[number - 1].get("extra")
    assert len(read()) == 3


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_are_offered_to_the_template(tmp_path, run, read, tokenizer, as_json):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    row = {"messages": TURNS, "tools": json.dumps(tools) if as_json else tools}
    run(write_lines(tmp_path / "a.jsonl", [row]))
    before = f"<|im_start|>system\n{json.dumps(tools[0])}<|im_end|>\n"
    (got,) = read()
    assert (got["input_ids"], got["loss_mask"]) == expected_tokens(rendered(TURNS, before), tokenizer)


@pytest.mark.parametrize("how", ["a tokenizer without template", "--chat-template none"])
def test_raw_text(tmp_path, run, read, tokenizer, plain_tokenizer, how):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "2+2=", "completion": "4"}])
    if how == "--chat-template none":
        run(path, chat_template="none")
    else:
        run(path, tokenizer=plain_tokenizer)
    (got,) = read()
    expected = expected_tokens([("2+2=", False), ("4<|im_end|>", True)], tokenizer)
    assert (got["input_ids"], got["loss_mask"]) == expected
    stored = AutoTokenizer.from_pretrained(tmp_path / "store" / "tokenizer")
    assert stored.chat_template is None


def test_turns_need_a_template(tmp_path, run, plain_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", examples(1))
    with pytest.raises(UsageError, match="has no chat template: pass one with --chat-template FILE"):
        run(path, tokenizer=plain_tokenizer)


def test_a_template_file_is_used_and_stored(tmp_path, run, read, tokenizer, plain_tokenizer):
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}])
    run(path, tokenizer=plain_tokenizer, chat_template=str(template))
    (got,) = read()
    assert (got["input_ids"], got["loss_mask"]) == expected_tokens(rendered(TURNS), tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "store" / "tokenizer").chat_template == CHATML
    with pytest.raises(UsageError, match="cannot read the chat template gone.jinja"):
        run(path, chat_template="gone.jinja", store="other")


TOKENIZED = [
    {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "note": "n"},
    {"input_ids": [5, 6], "labels": [5, 6], "note": "n"},
]


@pytest.mark.parametrize("scored", ["labels", "loss_mask"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tokenized_rows_need_no_template(tmp_path, run, read, plain_tokenizer, kind, scored):
    rows = [
        row
        if scored == "labels"
        else {**row, "labels": None, "loss_mask": [label != -100 for label in row["labels"]]}
        for row in TOKENIZED
    ]
    if kind == "jsonl":
        path = write_lines(tmp_path / "a.jsonl", rows)
    else:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    _, said = run(path, tokenizer=plain_tokenizer)
    first, second = read()
    assert (first["input_ids"], first["loss_mask"]) == ([1, 2, 3, 4], [False, True, False, True])
    assert (second["input_ids"], second["loss_mask"]) == ([5, 6], [False, True])
    assert json.loads(first["record"]) == {"note": "n"}, "token columns are in the corpus already"
    assert "1 samples whose first token is left unscored, as nothing precedes it" in said
    assert "scored spans: as given with the token ids" in said


def test_ids_outside_the_vocabulary_are_rejected(tmp_path, run, quarantine):
    rows = [
        {"input_ids": [1, 257], "loss_mask": [0, 1]},
        {"input_ids": [1, 258], "loss_mask": [0, 1]},
        {"input_ids": [1, 0, -1], "loss_mask": [0, 1, 0]},
    ]
    outcome, _ = run(write_lines(tmp_path / "a.jsonl", rows))
    assert outcome.rejected == 2
    assert quarantine() == [
        (
            "a.jsonl",
            2,
            "token id 258 at position 1 is none of the tokenizer's 258",
            json.dumps(rows[1]).encode(),
        ),
        (
            "a.jsonl",
            3,
            "token id -1 at position 2 is none of the tokenizer's 258",
            json.dumps(rows[2]).encode(),
        ),
    ]


def test_named_fields(tmp_path, run, read, quarantine, tokenizer):
    good = {"question": "q", "r1": "a", "key": 7, "id": "x", "origin": "web", "reward": -1}
    rows = [
        good,
        {**good, "key": "8", "reward": 1.0, "origin": 3},
        {**good, "key": "9", "reward": 0},
        {**good, "key": "10", "reward": True},
        {**good, "key": "11", "reward": None},
        {**good, "key": "12", "origin": None},
        {**good, "key": ""},
        {**good, "key": 1.5},
        {**good, "key": True},
        {"question": "q", "r1": "a"},
    ]
    run(
        write_lines(tmp_path / "a.jsonl", rows),
        prompt_field="question",
        response_field="r1",
        id_field="key",
        source_field="origin",
        label_field="reward",
    )
    ids, mask = expected_tokens(rendered(TURNS), tokenizer)
    assert [(row["sample_id"], row["source"], row["label"]) for row in read()] == [
        ("7", "web", -1),
        ("8", "3", 1),
    ]
    assert all((row["input_ids"], row["loss_mask"]) == (ids, mask) for row in read())
    assert [reason for _, _, reason, _ in quarantine()] == [
        "field 'reward' is 0: a label is 1 or -1",
        "field 'reward' is True: a label is 1 or -1",
        "field 'reward' is None: a label is 1 or -1",
        "field 'origin' is missing or null",
        "field 'key' is empty: it holds the sample id",
        "field 'key' is neither a string nor an integer",
        "field 'key' is neither a string nor an integer",
        "field 'key' is missing or null",
    ]


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"uuid": "u", "id": 5}, "5"),
        ({"uuid": "u", "id": 5, "sample_id": "s"}, "s"),
        ({"uuid": "u", "id": None}, "u"),
        ({"id": 1.5}, "a.jsonl:1"),
        ({}, "a.jsonl:1"),
    ],
)
def test_ids_are_recognised(tmp_path, run, read, fields, ids):
    run(write_lines(tmp_path / "a.jsonl", [{"messages": TURNS, **fields}]))
    assert [row["sample_id"] for row in read()] == [ids]


def test_ids_never_become_paths(tmp_path, run, read):
    ids = ["../../escaped", "/etc/x", "nul\0byte", "a\nb", "\x1b[2J"]
    run(write_lines(tmp_path / "a.jsonl", [{"messages": TURNS, "id": each} for each in ids]))
    assert [row["sample_id"] for row in read()] == ids
    assert not list(tmp_path.parent.rglob("*escaped*"))


def test_what_was_decided_is_said_and_kept(tmp_path, run):
    path = write_lines(
        tmp_path / "a.jsonl", [{**row, "problem": "p", "solution": "s"} for row in examples(3)]
    )
    other = write_lines(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a", "id": i} for i in range(3)])
    with other.open("a") as file:
        file.write("\n\n{}\n")
    outcome, said = run(path, other)
    assert outcome.summary == (
        "corpus: 6 samples of 252 tokens, 99 of them scored, "
        "1 rows in quarantine (`pear-data quarantine list`)"
    )
    assert outcome.rejected == 1
    assert said == [
        "a.jsonl: layout messages (fits problem+solution too; the first in order is taken), ids from row numbers",
        "b.jsonl: layout prompt+completion, ids from field 'id'",
        "scored spans: prefix renderings",
        "part-00000: 1 rows quarantined, the first b.jsonl:6: field 'prompt' is missing or null",
        "2 blank lines passed over",
        "7 rows read",
    ]
    stage = open_store(tmp_path / "store").stage("corpus")
    assert stage.decisions == {
        "inputs": {
            "a.jsonl": "layout messages (fits problem+solution too; the first in order is taken), ids from row numbers",
            "b.jsonl": "layout prompt+completion, ids from field 'id'",
        },
        "scored_spans": "prefix renderings",
        "counts": {"blank lines passed over": 2, "rows read": 7},
    }


def test_the_tokenizer_is_stored_with_the_text_of_every_id(tmp_path, run, tokenizer):
    run(write_lines(tmp_path / "a.jsonl", examples(1)))
    store = open_store(tmp_path / "store")
    entry = store.manifest.tokenizer
    assert entry.name == tokenizer
    for file in entry.files:
        assert store.fault_of(file) is None
    original, stored = (AutoTokenizer.from_pretrained(path) for path in (tokenizer, store.path / "tokenizer"))
    text = "<|im_start|>user\né\U0001f600<|im_end|>"
    assert stored(text)["input_ids"] == original(text)["input_ids"]
    assert stored.chat_template == original.chat_template
    vocabulary = pq.read_table(store.file(entry.vocabulary))
    assert vocabulary.schema.equals(VOCABULARY)
    assert vocabulary["token_id"].to_pylist() == list(range(258))
    assert vocabulary["token"].to_pylist()[-2:] == ["<|im_start|>", "<|im_end|>"]


REASONED = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a", "reasoning_content": "why"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2", "reasoning_content": "so"},
]


def test_a_rewriting_template_needs_a_choice(tmp_path, run, read, rewriting_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": REASONED, "id": "x"}])
    with pytest.raises(UsageError, match="choose --turns last"):
        run(path, tokenizer=rewriting_tokenizer)
    # Nothing was committed, so the choice can be made in the same store.
    run(path, tokenizer=rewriting_tokenizer, turns="all")
    first, second = read()
    assert [first["sample_id"], second["sample_id"]] == ["x#1", "x#2"]
    one = chat(("user", "q"), ("assistant", "<think>why</think>a"))
    assert (first["input_ids"], first["loss_mask"]) == expected_tokens(rendered(one), rewriting_tokenizer)
    assert first["record"] == second["record"]
