"""Rows read with another tokenizer and template, and a foreign policy's scores brought back to the corpus's tokens."""

from __future__ import annotations

import json
import shutil
from datetime import date

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from pear_data import open_store
from pear_data.config import IngestSettings, ScoreSettings
from pear_data.corpus.batches import token_batch
from pear_data.demo import asset
from pear_data.errors import SampleError, UsageError
from pear_data.progress import Silent
from pear_data.stages.foreign_source import foreign_source, foreign_text
from pear_data.stages.ingest import ingest
from pear_data.stages.sources import GroupScores, PolicySource
from pear_data.store import writable_store

HEADER = "{{ '[' + message['role'] + ']' }}"
END = "{{ '<|endoftext|>' }}"
PROMPT = "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"


def template(content="message['content']"):
    """One with another end of turn than the bundled tokenizer's."""
    return "{% for message in messages %}" + HEADER + "{{ " + content + " }}" + END + "{% endfor %}" + PROMPT


# Turns before the last lose what they thought.
REWRITING = template("message['content'] if loop.last else message['content'].split('</think>')[-1]")
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
    + template()
)


def save_tokenizer(folder, chat_template, *, merges=None, normalizer=None):
    """The bundled tokenizer with another template and, of its merges, the first ones only."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(asset("initial") / name, folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["merges"] = settings["model"]["merges"][:merges]
    settings["normalizer"] = normalizer
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    # Qwen's own class puts its normalizer back.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if chat_template:
        (folder / "chat_template.jinja").write_text(chat_template)
    return str(folder)


@pytest.fixture
def foreign(tmp_path):
    return save_tokenizer(tmp_path / "foreign", template(), merges=20)


def turns(*texts):
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


@pytest.fixture
def corpus(tmp_path):
    """`corpus(rows)`: a store of them."""

    def make(rows, **settings):
        path = tmp_path / "corpus.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = IngestSettings(corpus=[str(path)], **{"tokenizer": str(asset("initial")), **settings})
        with writable_store(tmp_path / "store", create=True) as store:
            ingest(store, given, Silent())
        return open_store(tmp_path / "store")

    return make


def opened(store, model, **settings):
    given = ScoreSettings(policy="behavior", model=model, align="bytes", **settings)
    return foreign_text(store, model, given)


def read(store, model, **settings):
    table = store.corpus.to_table()
    batch = token_batch(table)
    return batch, list(opened(store, model, **settings).rows.read(batch, table))


@pytest.fixture
def decode():
    tokenizer = AutoTokenizer.from_pretrained(asset("initial"))
    return lambda sample: tokenizer.decode(sample.input_ids[sample.loss_mask])


def test_each_turns_text_and_end_stand_for_those_of_the_corpus(corpus, foreign, decode):
    store = corpus([turns("a", "b é", "c", "d <|endoftext|>"), turns("q", "")])
    _, rows = read(store, foreign)
    assert [decode(sample) for row in rows for sample in row.samples] == [
        "b é<|endoftext|>d <|endoftext|><|endoftext|>",
        "<|endoftext|>",
    ]
    assert rows[0].pieces == [(4, 4, True), (10, 13, False), (15, 15, True), (10, 13, False)]
    assert rows[1].pieces == [(0, 0, True), (10, 13, False)]


def test_what_a_template_writes_in_front_of_every_answer_is_its_own(corpus, tmp_path, decode):
    channel = "('<final>' if message['role'] == 'assistant' else '') + message['content']"
    model = save_tokenizer(tmp_path / "channels", template(channel))
    (row,) = read(corpus([turns("a", "b é", "c", "")]), model)[1]
    assert decode(row.samples[0]) == "<final>b é<|endoftext|><final><|endoftext|>"
    assert [piece for piece in row.pieces if piece[:2] != (0, 0)] == [
        (0, 7, False),
        (4, 4, True),
        (10, 13, False),
        (0, 7, False),
        (10, 13, False),
    ]


def test_a_template_that_rewrites_earlier_turns_reads_each_turn_in_its_own_context(corpus, tmp_path, decode):
    answers = "<think>x</think>one", "<think>y</think>two"
    store = corpus([turns("a", answers[0], "b", answers[1])])
    (row,) = read(store, save_tokenizer(tmp_path / "rewriting", REWRITING))[1]
    assert [decode(sample) for sample in row.samples] == [f"{text}<|endoftext|>" for text in answers]
    assert row.pieces == [
        piece for text in answers for piece in ((len(text), len(text), True), (10, 13, False))
    ]


@pytest.mark.parametrize(("choice", "wanted"), [("all", ["one", "two"]), ("last", ["two"])])
def test_samples_of_one_turn_are_compared_on_that_turn(corpus, tmp_path, foreign, decode, choice, wanted):
    own = save_tokenizer(tmp_path / "own", REWRITING)
    row = turns("a", "<think>x</think>one", "b", "<think>y</think>two")
    batch, rows = read(corpus([row, row], tokenizer=own, turns=choice), foreign)
    assert len(batch) == 2 * len(wanted)
    assert [decode(sample).split("</think>")[1] for row in rows for sample in row.samples] == [
        f"{text}<|endoftext|>" for text in wanted
    ] * 2


def test_raw_prompts_and_responses_against_a_chat_template(corpus, foreign, decode):
    store = corpus([{"prompt": "1+1=", "completion": "2 é"}], chat_template="none")
    (row,) = read(store, foreign)[1]
    assert decode(row.samples[0]) == "2 é<|endoftext|>"
    assert row.pieces[0] == (4, 4, True)
    both_raw = read(store, str(asset("initial")).replace("initial", "behavior"))[1]
    assert both_raw[0].pieces[0] == (4, 4, True)


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        (turns("q", " a "), {"chat_template": template("message['content'] | trim")}, "read different texts"),
        (turns("q", "ABC"), {"normalizer": {"type": "Lowercase"}}, "do not spell the text"),
        (turns("q", "e\u0301"), {}, "read different texts"),
        ({"messages": [{"role": "system", "content": "s"}, *turns("q", "a")["messages"]]}, {}, "no system"),
    ],
)
def test_rows_that_are_read_differently_say_why(corpus, tmp_path, row, settings, reason):
    settings = {"chat_template": REFUSING, **settings}
    model = save_tokenizer(tmp_path / "other", **settings)
    _, (different, plain) = read(corpus([row, turns("q", "fine")]), model)
    assert isinstance(different, SampleError)
    assert reason in str(different)
    assert not isinstance(plain, SampleError)


def test_two_tokenizers_that_compose_characters_agree(corpus, tmp_path):
    model = save_tokenizer(tmp_path / "other", template(), normalizer={"type": "NFC"})
    ((row,)) = read(corpus([turns("q", "e\u0301!")]), model)[1]
    assert row.pieces[0] == (3, 3, True)


# R1's: the generation prompt opens the thinking, and a turn's thinking is not rendered.
THINKING = template("message['content'].split('</think>')[-1]").replace(
    "[assistant]", "[assistant]<think>\\n"
)


def test_a_template_of_the_users_own_takes_the_place_of_the_models(corpus, tmp_path, decode):
    model = save_tokenizer(tmp_path / "thinking", THINKING)
    store = corpus([turns("q", "<think>\nwhy\n</think>\n\na")])
    (refused,) = read(store, model)[1]
    assert "does not go on from the template's generation prompt" in str(refused)
    own = tmp_path / "own.jinja"
    own.write_text(THINKING.replace(".split('</think>')[-1]", ""))
    (row,) = read(store, model, model_template=str(own))[1]
    assert decode(row.samples[0]) == "why\n</think>\n\na<|endoftext|>"
    assert [piece for piece in row.pieces if piece[:2] != (0, 0)] == [
        (8, 0, False),
        (15, 15, True),
        (10, 13, False),
    ]
    with pytest.raises(UsageError, match="cannot read the chat template nowhere"):
        opened(store, model, model_template="nowhere")
    with pytest.raises(ValidationError, match="goes with align bytes"):
        ScoreSettings(model=model, model_template="x")


def test_a_corpus_of_token_ids_and_a_model_without_template_are_refused(corpus, tmp_path, foreign):
    bare = save_tokenizer(tmp_path / "bare", None)
    with pytest.raises(UsageError, match="came as token ids"):
        opened(corpus([{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}]), foreign)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(UsageError, match="has no chat template to render the corpus with"):
        opened(corpus([turns("q", "a")]), bare)


def test_token_ids_among_texts_have_no_text(corpus, tmp_path, foreign):
    path = tmp_path / "ids.jsonl"
    path.write_text(json.dumps({"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}) + "\n")
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps(turns("q", "a")) + "\n")
    given = IngestSettings(corpus=[str(path), str(texts)], tokenizer=str(asset("initial")))
    with writable_store(tmp_path / "store", create=True) as store:
        ingest(store, given, Silent())
    _, (ids, text) = read(open_store(tmp_path / "store"), foreign)
    assert "came as token ids" in str(ids)
    assert not isinstance(text, SampleError)


def fake_source(status=None, reasons=None):
    """Scores token t of its batch's scored tokens -t, and counts the tokens in two goes."""
    seen = []

    def score_group(batch, records, on_tokens):
        seen.append(batch)
        half = len(batch.input_ids) // 2
        on_tokens(half)
        on_tokens(len(batch.input_ids) - half)
        values = -np.arange(batch.loss_mask.sum()).astype(np.float32)
        found = np.array(status or ["ok"] * len(batch), dtype=object)
        return GroupScores(values, found, reasons=reasons or {})

    return PolicySource({"engine": "fake"}, score_group, workers=3), seen


def test_scores_are_summed_over_spans_and_spread(corpus, foreign):
    store = corpus([turns("q", "1+1=2, left"), turns("q", "e\u0301"), turns("q", "Answer: 24", "r", "x")])
    source, seen = fake_source()
    text = opened(store, foreign)
    aligned = foreign_source(source, text)
    assert (aligned.workers, aligned.corpus_columns) == (3, ("record",))
    assert aligned.settings.keys() == {"engine", "align", "tokenizer", "chat_template"}
    table = store.corpus.to_table()
    batch, counted = token_batch(table), []
    scores = aligned.score_group(batch, table, counted.append)
    assert scores.status.tolist() == ["ok", "unaligned", "ok"]
    assert scores.reasons.keys() == {1}
    assert sum(counted) == len(batch.input_ids)
    (theirs,) = seen
    assert len(theirs) == 2
    tokens = np.split(scores.spans.tokens, np.cumsum(scores.spans.per_row)[:-1])
    assert [part.sum() for part in tokens] == [batch.num_scored[0], 0, batch.num_scored[2]]
    logprobs = np.split(scores.logprobs, batch.scored_offsets[1:-1])
    want = np.split(-np.arange(theirs.loss_mask.sum()).astype(float), theirs.scored_offsets[1:-1])
    for row, other in ((0, 0), (2, 1)):
        assert logprobs[row].sum(dtype=np.float64) == pytest.approx(want[other].sum(), rel=1e-6)
        spread = np.split(logprobs[row], np.cumsum(tokens[row])[:-1])
        assert all((part == part[0]).all() for part in spread)
    assert logprobs[0][-1] == want[0][-1]  # the ends of turns stand for each other


def test_a_model_of_the_same_tokenizer_gets_the_corpuss_own_tokens(corpus):
    store = corpus([turns("q", "1+1=2 é", "r", "say <|im_end|>"), turns("s", "")])
    table = store.corpus.to_table()
    batch = token_batch(table)
    source, seen = fake_source()
    aligned = foreign_source(source, opened(store, str(asset("behavior"))))
    scores = aligned.score_group(batch, table, lambda tokens: None)
    assert (seen[0].input_ids == batch.input_ids).all()
    assert (seen[0].loss_mask == batch.loss_mask).all()
    assert scores.logprobs.tolist() == (-np.arange(batch.num_scored.sum())).tolist()
    assert set(scores.spans.tokens.tolist()) == {1}


def test_a_row_fails_where_one_of_its_samples_does(corpus, tmp_path):
    rows = [turns("a", "<think>x</think>one", "b", "two"), turns("a", "one"), turns("a", "one", "b", "two")]
    store = corpus(rows)
    text = opened(store, save_tokenizer(tmp_path / "rewriting", REWRITING))
    source, _ = fake_source(["ok", "failed", "too_long", "ok"], {1: "boom"})
    table = store.corpus.to_table()
    scores = foreign_source(source, text).score_group(token_batch(table), table, lambda tokens: None)
    assert scores.status.tolist() == ["failed", "too_long", "ok"]
    assert scores.reasons == {0: "boom"}


def test_a_row_group_that_cannot_be_compared_at_all(corpus, foreign):
    store = corpus([turns("q", "e\u0301")])
    source, seen = fake_source()
    table = store.corpus.to_table()
    counted = []
    scores = foreign_source(source, opened(store, foreign)).score_group(
        token_batch(table), table, counted.append
    )
    assert (scores.status.tolist(), seen) == (["unaligned"], [])
    assert counted == [table["num_tokens"][0].as_py()]
    assert scores.spans.per_row.tolist() == [0]


def test_a_template_that_writes_the_date_gets_that_of_the_corpus_or_of_the_day_scoring_began(
    corpus, tmp_path, foreign
):
    dated = "{{ strftime_now('%Y-%m-%d') }}"
    model = save_tokenizer(tmp_path / "dated", dated + template())
    store = corpus([turns("q", "a")])
    assert opened(store, model).settings["chat_template_date"] == date.today().isoformat()
    with writable_store(store.path) as writable:
        writable.begin("scores/behavior", {"chat_template_date": "2001-02-03"})
        store = writable
        assert opened(store, model).settings["chat_template_date"] == "2001-02-03"
        (row,) = read(store, model)[1]
        text = AutoTokenizer.from_pretrained(model).decode(row.samples[0].input_ids)
        assert text.startswith("2001-02-03[user]q")
        store.manifest.stages["corpus"].settings["chat_template_date"] = "2002-03-04"
        assert opened(store, model).settings["chat_template_date"] == "2002-03-04"
    assert "chat_template_date" not in opened(store, foreign).settings


def test_a_faulty_template_is_told_with_the_option_that_replaces_it(corpus, tmp_path, foreign):
    store = corpus([turns("q", "a", "r", "b")])
    with pytest.raises(UsageError, match=r"broken: .* not valid Jinja.* --model-template FILE"):
        opened(store, save_tokenizer(tmp_path / "broken", "{{ messages }"))
    table = store.corpus.to_table()
    raw = foreign_source(fake_source()[0], opened(store, foreign, model_template="none"))
    scores = raw.score_group(token_batch(table), table, lambda tokens: None)
    assert "pass a chat template with --model-template FILE" in scores.reasons[0]
