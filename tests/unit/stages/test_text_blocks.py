"""Blocks of text against a reading of the same text character by character."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pear_data import open_store
from pear_data.config import IngestSettings, ScoreSettings, WeightSettings
from pear_data.demo import asset
from pear_data.errors import MismatchError, UsageError
from pear_data.progress import Silent
from pear_data.stages.ingest import ingest
from pear_data.stages.score import score_policy
from pear_data.stages.text_blocks import BlockCutter, open_block_cutter
from pear_data.stages.weight import weight
from pear_data.store import writable_store

STOPS, CJK_STOPS = ".!?…؟\u06d4।", "。\uff01\uff1f\uff0e｡"
CLOSING = "\"'”\u2019»\u203a)]}」』》〉】\uff09\uff3d*_"
quick = settings(max_examples=300, deadline=None)


def by(block_by, block_regex=None):
    return WeightSettings(level="block", block_by=block_by, block_regex=block_regex)


def cutter_of(tokens, given):
    """A cutter whose token ids are the places of `tokens` (bytes)."""
    lengths = np.array([len(token) for token in tokens], dtype=np.int64)
    return BlockCutter.of(given, np.frombuffer(b"".join(tokens), dtype=np.uint8), lengths)


def cut(cutter, *samples):
    """Block lengths of samples given as lists of (token id, scored)."""
    flat = [token for sample in samples for token in sample]
    ids = np.array([token for token, _ in flat], dtype=np.int32)
    mask = np.array([scored for _, scored in flat], dtype=np.bool_)
    return cutter.block_lengths(
        ids, mask, np.array([len(sample) for sample in samples], dtype=np.int64)
    ).tolist()


# -- the reference ---------------------------------------------------------------------------------------


def next_newline(text, at):
    """Whether the white space from `at` on holds a newline."""
    while at < len(text) and text[at].isspace():
        if text[at] == "\n":
            return True
        at += 1
    return False


def line_ends(text):
    return [at + 1 for at, char in enumerate(text) if char == "\n" and not next_newline(text, at + 1)]


def sentence_ends(text):
    ends = set(line_ends(text))
    for at in range(len(text)):
        for stops in (STOPS, CJK_STOPS):
            if text[at] not in stops or (at and text[at - 1] in stops):
                continue
            end = at
            while end < len(text) and text[end] in stops:
                end += 1
            while end < len(text) and text[end] in CLOSING:
                end += 1
            ended = stops is CJK_STOPS or end == len(text) or text[end].isspace()
            if ended and not next_newline(text, end):
                ends.add(end)
    return ends


def regex_ends(pattern):
    return lambda text: [match.end() for match in re.finditer(pattern, text) if match.group()]


def reference(tokens, turns, ends_of):
    """Block lengths of turns (lists of token ids), each read byte by byte."""
    found = []
    for turn in turns:
        owner = [index for index, token in enumerate(turn) for _ in tokens[token]]
        text = b"".join(tokens[token] for token in turn).decode("utf-8", "surrogateescape")
        last_byte = np.cumsum([len(char.encode("utf-8", "surrogateescape")) for char in text]) - 1
        ends = {owner[last_byte[end - 1]] + 1 for end in ends_of(text)} | {len(turn)}
        found += np.diff(sorted({0, *ends})).tolist()
    return found


# -- properties ------------------------------------------------------------------------------------------

pieces = st.sampled_from(
    [
        *(
            " ",
            "  ",
            "\n",
            "\n\n",
            " \n",
            "\r\n",
            "\t",
            "a",
            "b.",
            ".",
            "..",
            "?!",
            "…",
            "3.14",
            '."',
            ".)",
            "**",
        ),
        *("。", "\uff01", "」", "漢", "字。", "é", "🙂", "\u2028", "\u3000", "", "<|end|>"),
    ]
).map(str.encode) | st.binary(max_size=3)
vocabularies = st.lists(pieces, min_size=1, max_size=12)


@st.composite
def cases(draw):
    """Tokens, samples over them, and the samples' scored turns."""
    tokens = draw(vocabularies)
    ids = st.integers(0, len(tokens) - 1)
    samples, turns = [], []
    for _ in range(draw(st.integers(0, 4))):
        sample = []
        for _ in range(draw(st.integers(0, 3))):
            sample += [(token, False) for token in draw(st.lists(ids, min_size=1, max_size=3))]
            turns.append(draw(st.lists(ids, min_size=1, max_size=12)))
            sample += [(token, True) for token in turns[-1]]
        samples.append(sample)
    return tokens, samples, turns


KINDS = [
    (by("lines"), line_ends),
    (by("sentences"), sentence_ends),
    (by("regex", r"\W+|$"), regex_ends(r"\W+|$")),
    (by("regex", "(?<=é)|[a-c]|漢字?"), regex_ends("(?<=é)|[a-c]|漢字?")),
]


@pytest.mark.parametrize(("given_settings", "ends_of"), KINDS)
@quick
@given(case=cases())
def test_blocks_are_those_read_character_by_character(given_settings, ends_of, case):
    tokens, samples, turns = case
    found = cut(cutter_of(tokens, given_settings), *samples)
    assert found == reference(tokens, turns, ends_of)
    assert all(length >= 1 for length in found)
    assert sum(found) == sum(map(len, turns))


def test_turns_of_any_number_and_length_are_cut_alike(monkeypatch):
    random = np.random.default_rng(0)
    tokens = [b"a", b" b", b".", b"\n", b"\xe6\xbc", b"\xa2"]
    turns = [random.integers(0, len(tokens), random.integers(1, 40)).tolist() for _ in range(200)]
    samples = [[(0, False), *((token, True) for token in turn)] for turn in turns]
    monkeypatch.setattr("pear_data.stages.text_blocks._CHUNK_TOKENS", 30)
    assert cut(cutter_of(tokens, by("sentences")), *samples) == reference(tokens, turns, sentence_ends)


# -- what they are for people ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_by", "text", "blocks"),
    [
        ("lines", "one\ntwo\r\n\n  \nthree", ["one\n", "two\r\n\n  \n", "three"]),
        ("lines", "def f():\n    return 1\n", ["def f():\n", "    return 1\n"]),
        ("sentences", 'It is 3.14. "Really?" Yes!', ["It is 3.14.", ' "Really?"', " Yes!"]),
        ("sentences", "So **x = 2.**\n\nNext\nline", ["So **x = 2.**\n\n", "Next\n", "line"]),
        ("sentences", "はい。「いいえ。」そう", ["はい。", "「いいえ。」", "そう"]),
        ("sentences", "Wait... what", ["Wait...", " what"]),
    ],
)
def test_blocks_of_a_text(block_by, text, blocks):
    tokens = [bytes([byte]) for byte in range(256)]
    found = cut(cutter_of(tokens, by(block_by)), [(0, False), *((byte, True) for byte in text.encode())])
    assert found == [len(block.encode()) for block in blocks]


def test_a_block_ends_with_the_token_in_which_a_match_ends():
    tokens = [b"a", b".\nb", "。".encode()[:2], "。".encode()[2:] + b"c"]
    given = [(0, False), (0, True), (1, True), (0, True), (2, True), (3, True), (0, True)]
    assert cut(cutter_of(tokens, by("sentences")), given) == [2, 3, 1]


def test_a_block_ends_with_the_turn_and_with_the_sample():
    cutter = cutter_of([b"a"], by("lines"))
    two_turns = [(0, False), (0, True), (0, True), (0, False), (0, True)]
    assert cut(cutter, two_turns, [], [(0, False)], [(0, False), (0, True)]) == [2, 1, 1]
    assert cut(cutter) == []


@pytest.mark.parametrize(
    "text", ["." * 100_000 + "x", "\n" + " " * 100_000 + "x", "'" * 100_000, ". " * 50_000]
)
def test_no_text_is_slow(text):
    tokens = [text.encode()[at : at + 1] for at in range(len(text))]
    started = time.perf_counter()
    cut(cutter_of(tokens, by("sentences")), [(0, False), *((at, True) for at in range(len(text)))])
    assert time.perf_counter() - started < 5  # quadratic, it would be minutes


# -- with a store's tokenizer ----------------------------------------------------------------------------


def ingested(folder, rows):
    """A store of `rows` at `folder`, read with the bundled tokenizer."""
    path = folder.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with writable_store(folder, create=True) as store:
        ingest(store, IngestSettings(corpus=[str(path)], tokenizer=str(asset("initial"))), Silent())
    return open_store(folder)


@pytest.fixture(scope="module")
def rows():
    turns = [
        [
            ("user", "q"),
            ("assistant", "Step 1: ünï.\nStep 2: 漢字。🙂🏽!\n\nDone"),
            ("user", "."),
            ("assistant", "B."),
        ],
        [("user", "q"), ("assistant", "one line")],
    ]
    return [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]


@pytest.fixture(scope="module")
def corpus(rows, tmp_path_factory):
    return ingested(tmp_path_factory.mktemp("blocks") / "store", rows).path


@pytest.mark.parametrize(
    ("block_by", "regex", "blocks"),
    [
        (
            "lines",
            None,
            [
                "Step 1: ünï.\n",
                "Step 2: 漢字。🙂🏽!\n\n",
                "Done<|im_end|>",
                "B.<|im_end|>",
                "one line<|im_end|>",
            ],
        ),
        (
            "regex",
            r"Step \d:",
            [
                "Step 1:",
                " ünï.\nStep 2:",
                " 漢字。🙂🏽!\n\nDone<|im_end|>",
                "B.<|im_end|>",
                "one line<|im_end|>",
            ],
        ),
    ],
)
def test_a_corpus_is_cut_by_the_text_of_its_own_tokenizer(corpus, block_by, regex, blocks):
    store = open_store(corpus)
    rows = store.corpus.to_table()
    ids, masks = (rows[name].to_pylist() for name in ("input_ids", "loss_mask"))
    cutter = open_block_cutter(store, by(block_by, regex))
    lengths = np.array([len(row) for row in ids])
    found = cutter.block_lengths(
        np.concatenate(ids).astype(np.int32), np.concatenate(masks).astype(np.bool_), lengths
    )
    tokenizer = AutoTokenizer.from_pretrained(asset("initial"))
    scored = [
        token for row, mask in zip(ids, masks, strict=True) for token, on in zip(row, mask, strict=True) if on
    ]
    ends = np.cumsum(found).tolist()
    texts = [tokenizer.decode(scored[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    assert texts == blocks


@pytest.mark.parametrize(
    ("block_by", "regex"), [("lines", None), ("sentences", None), ("regex", r"Step \d:")]
)
def test_weights_are_those_of_the_texts_blocks(corpus, rows, tmp_path, block_by, regex):
    """log G_t = (T - e) log gamma + the sum of the clipped log-ratios behind e, the end of the block t is in."""
    random = np.random.default_rng(0)
    counts = open_store(corpus).corpus.to_table()["num_scored"].to_pylist()
    recorded = [
        {policy: (-random.exponential(0.3, count)).tolist() for policy in ("initial", "behavior")}
        for count in counts
    ]
    store = ingested(
        tmp_path / "store", [{**row, **logprobs} for row, logprobs in zip(rows, recorded, strict=True)]
    )
    given = by(block_by, regex).model_copy(update={"name": "text", "gamma": 0.9, "workers": 1})
    with writable_store(store.path) as writable:
        for policy in ("initial", "behavior"):
            score_policy(writable, ScoreSettings(policy=policy, from_field=policy), Silent())
        weight(writable, given, Silent())
    store = open_store(store.path)
    table = store.corpus.to_table()
    found = store.weights["text"].to_table()["weights"].to_pylist()
    cutter = open_block_cutter(store, given)
    for ids, mask, logprobs, got in zip(
        table["input_ids"].to_pylist(), table["loss_mask"].to_pylist(), recorded, found, strict=True
    ):
        blocks = cutter.block_lengths(np.int32(ids), np.array(mask), np.array([len(ids)]))
        ratios = np.float32(logprobs["initial"]).astype(np.float64) - np.float32(logprobs["behavior"])
        clipped = np.clip(ratios, *given.clip_log_ratio)
        want = []
        for length, end in zip(blocks, np.cumsum(blocks), strict=True):
            want += [(len(clipped) - end) * np.log(0.9) + clipped[end:].sum()] * int(length)
        assert got == pytest.approx(np.exp(want), rel=1e-6)


def test_a_store_without_a_tokenizer_is_told_what_to_do(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "store")
    store = open_store(tmp_path / "store")
    store.manifest.tokenizer = None
    with pytest.raises(UsageError, match="no tokenizer.*use --block-by tokens"):
        open_block_cutter(store, by("lines"))


def test_a_tokenizer_whose_tokens_do_not_say_their_text_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path / "words")
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"input_ids": [0, 1], "loss_mask": [False, True]}))
    given = IngestSettings(corpus=[str(tmp_path / "corpus.jsonl")], tokenizer=str(tmp_path / "words"))
    with writable_store(tmp_path / "store", create=True) as store:
        ingest(store, given, Silent())
        with pytest.raises(UsageError, match="words are neither.*use --block-by tokens"):
            open_block_cutter(store, by("lines"))


def test_a_damaged_tokenizer_is_refused(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "store")
    with (tmp_path / "store" / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(MismatchError, match="run `pear-data verify`"):
        open_block_cutter(open_store(tmp_path / "store"), by("lines"))


def test_a_cutter_is_plain_arrays(corpus):
    """Workers get it without the tokenizer, whose package takes seconds to import."""
    cutter = open_block_cutter(open_store(corpus), by("lines"))
    assert {type(value) for value in dataclasses.asdict(cutter).values()} == {re.Pattern, np.ndarray}
