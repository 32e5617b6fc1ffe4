"""`--align bytes` with the tokenizers of real models, against a byte-level brute force and plain transformers."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from functools import cache

import numpy as np
import pytest
import torch
from foreign_tokenizers import save_byte_level, save_sentence_piece
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pear_data import importance_weights, open_store
from pear_data.config import IngestSettings, ScoreSettings, WeightSettings
from pear_data.corpus.batches import token_batch
from pear_data.demo import asset
from pear_data.errors import SampleError
from pear_data.progress import Silent
from pear_data.stages.foreign_rows import ReadRow
from pear_data.stages.foreign_source import common_spans_of, foreign_text
from pear_data.stages.ingest import ingest
from pear_data.stages.score import score_policy
from pear_data.stages.weight import weight
from pear_data.store import writable_store

BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
CODE = "def f(x):\n\tif x  >=  3:\n\t\treturn {'a': [x, 1_000_000]}\n\n\n    # ünï — “q”\r\n"
ANSWERS = [
    "2*3=6, left [4,6].\n4*6=24, done.\nAnswer: (2*3)*4",
    "Ünïcödé, 漢字と仮名、한국어, עברית, العربية ١٢٣, ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈🙂🏽 zalgo z̸̢̛͔̀ á̧",
    CODE + "x" * 50 + "\n" * 7 + "end",
    "a",
    "",
    "7",
    "🙂",
    "no: <|im_end|> and </s> and <|eot_id|>[INST]<s>, <think>",
    "many      spaces   inside\t\t\tand\n\n\n\nlines",
]


def turns(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def conversations():
    """Every answer alone, all of them as one conversation, and shuffled pieces of them."""
    rng = random.Random(0)
    made = [turns(f"q{number} ü 漢", answer) for number, answer in enumerate(ANSWERS)]
    made.append(turns(*itertools.chain.from_iterable((f"ask {n}", a) for n, a in enumerate(ANSWERS))))
    text = "".join(ANSWERS)
    for _ in range(20):
        pieces = [
            text[(start := rng.randrange(len(text))) : start + rng.randrange(40)].strip() for _ in range(4)
        ]
        made.append([{"role": "system", "content": "Be brief."}, *turns(*pieces)])
    return made


def save_model(folder, size):
    """A tiny Llama beside a tokenizer."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Folders of the policies: two of real vocabularies, and the bundled one of 409 tokens."""
    folder = tmp_path_factory.mktemp("foreign")
    made = {
        "sentence piece": save_sentence_piece(folder / "mistral"),
        "byte level": save_byte_level(folder / "tekken"),
    }
    for path in made.values():
        save_model(path, len(loaded(path)))
    return {**made, "bundled": str(asset("initial"))}


def ingested(folder, rows, **settings):
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with writable_store(folder / "store", create=True) as store:
        ingest(store, IngestSettings(corpus=[str(corpus)], **settings), Silent())
    return folder / "store"


@pytest.fixture(scope="module")
def stores(tmp_path_factory, foreign):
    """The corpus, tokenized by the policy of a name."""

    @cache
    def made(name):
        rows = [{"messages": messages} for messages in conversations()]
        return open_store(ingested(tmp_path_factory.mktemp("corpus"), rows, tokenizer=foreign[name]))

    return made


def read_rows(store, model, **settings):
    """Corpus batch, and what `model` reads of each row."""
    table = store.corpus.to_table()
    text = foreign_text(
        store, model, ScoreSettings(policy="behavior", model=model, align="bytes", **settings)
    )
    batch = token_batch(table)
    return batch, list(text.rows.read(batch, table))


@cache
def loaded(path):
    return AutoTokenizer.from_pretrained(path)


@cache
def token_bytes(path):
    """Bytes of each token, one by one."""
    tokenizer = loaded(path)
    added = tokenizer.get_added_vocab()
    sentence_piece = '"ByteFallback"' in tokenizer.backend_tokenizer.to_str()

    def spelled(token_id):
        piece = tokenizer.convert_ids_to_tokens(int(token_id))
        if piece in added:
            return piece.encode()
        if not sentence_piece:
            return bytes(BYTE_OF[char] for char in piece)
        if piece.startswith("<0x"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()

    return spelled


def runs(ids, mask):
    """The scored tokens of each turn: runs of the mask."""
    found, index = [], 0
    for value, group in itertools.groupby(mask):
        size = len(list(group))
        if value:
            found.append(ids[index : index + size])
        index += size
    return found


def brute_force(own, other):
    """Spans of one turn, as (own tokens, other's tokens), from the bytes of each token; the last has the turn's end.

    A template or tokenizer may put white space in front of the turn.
    """
    own_text, other_text = b"".join(own[:-1]), b"".join(other[:-1])
    core = min(own_text, other_text, key=len)
    assert own_text.endswith(core)
    assert other_text.endswith(core)
    assert not (own_text[: -len(core) or None] + other_text[: -len(core) or None]).strip() or not core
    own_ends = {len(b"".join(own[:count])) - len(own_text): count for count in range(1, len(own))}
    spans, own_at, other_at = [], 0, 0
    for count in range(1, len(other)):
        position = len(b"".join(other[:count])) - len(other_text)
        if position > -len(core) and position in own_ends:
            spans.append((own_ends[position] - own_at, count - other_at))
            own_at, other_at = own_ends[position], count
    return [*spans, (len(own) - own_at, len(other) - other_at)]


def expected_spans(batch, index, row, own_bytes, other_bytes):
    at = slice(*batch.offsets[index : index + 2])
    own_turns = runs(batch.input_ids[at], batch.loss_mask[at])
    other_turns = [run for sample in row.samples for run in runs(sample.input_ids, sample.loss_mask)]
    return [
        span
        for own, other in zip(own_turns, other_turns, strict=True)
        for span in brute_force([own_bytes(token) for token in own], [other_bytes(token) for token in other])
    ]


PAIRS = [
    ("bundled", "sentence piece"),
    ("bundled", "byte level"),
    ("byte level", "sentence piece"),
    ("sentence piece", "byte level"),
]


@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_spans_are_those_of_a_byte_level_brute_force(stores, foreign, own, other):
    batch, rows = read_rows(stores(own), foreign[other])
    own_bytes, other_bytes = token_bytes(foreign[own]), token_bytes(foreign[other])
    assert not [row for row in rows if isinstance(row, SampleError)]
    want = [expected_spans(batch, index, row, own_bytes, other_bytes) for index, row in enumerate(rows)]
    flat = np.array([span for spans in want for span in spans])
    tokens, other_last = common_spans_of(rows)
    assert tokens.tolist() == flat[:, 0].tolist()
    assert np.diff(other_last, prepend=-1).tolist() == flat[:, 1].tolist()
    several = (flat > 1).sum(axis=0)
    print(f"{own} and {other}: {len(flat)} spans of {flat.sum(axis=0)} tokens, {several} of several tokens")
    assert (several > 5).all()


ALPHABET = [
    *"abcXYZ \n\t.,'\"-_<>|[]/{}0123456789",
    *"éüñğ漢字仮名한국어עבריתالعربية😀👩‍👧🏳️🌈​\ufeff\u00a0ĠĊ",
    *("e\u0301", "ក្ន", "▁", "<0x0A>", "\r\n", " " * 7, "the ", "ing", "return", "</think>"),
    *("<|im_end|>", "</s>", "<s>", "[INST]", "<|eot_id|>", "<|endoftext|>", "<think>"),
]


def random_conversations(seed):
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices(ALPHABET, k=rng.randrange(50)))

    return [
        turns(*(f"q{text()}q" if n % 2 == 0 else text() for n in range(2 * rng.randint(1, 3))))
        for _ in range(150)
    ]


def readable(text, own, other):
    """Whether both tokenizers and templates keep a text as it is, or change it alike."""
    if "sentence piece" in (own, other) and "▁" in text:
        return False  # SentencePiece takes it for a space
    if "bundled" in (own, other) and unicodedata.normalize("NFC", text) != text:
        return False  # it composes characters
    return "byte level" not in (own, other) or text == text.strip()  # Llama's template trims


@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_random_texts_are_aligned_or_refused_for_what_their_tokenizers_change(tmp_path, foreign, own, other):
    conversations = random_conversations(7)
    folder = ingested(
        tmp_path, [{"messages": messages} for messages in conversations], tokenizer=foreign[own]
    )
    batch, rows = read_rows(open_store(folder), foreign[other])
    aligned = 0
    for index, (messages, row) in enumerate(zip(conversations, rows, strict=True)):
        fit = all(readable(turn["content"], own, other) for turn in messages[1::2])
        assert isinstance(row, ReadRow) == fit, messages
        if fit:
            want = expected_spans(batch, index, row, token_bytes(foreign[own]), token_bytes(foreign[other]))
            tokens, other_last = common_spans_of([row])
            found = zip(tokens.tolist(), np.diff(other_last, prepend=-1).tolist(), strict=True)
            assert [*found] == want
            aligned += 1
    print(f"{own} and {other}: {aligned} of {len(rows)} conversations aligned")
    assert aligned > len(rows) / 10


@pytest.mark.parametrize("other", ["sentence piece", "byte level"])
def test_the_foreign_tokens_are_those_of_the_models_own_chat_template(stores, foreign, other):
    tokenizer = loaded(foreign[other])
    _, rows = read_rows(stores("bundled"), foreign[other])
    plain = 0
    for messages, row in zip(conversations(), rows, strict=True):
        if any(token in turn["content"] for turn in messages for token in tokenizer.all_special_tokens):
            continue
        (sample,) = row.samples
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert sample.input_ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
        plain += 1
    assert plain > 15


def plain_logprobs(model, ids):
    """Of each token behind the first, by transformers alone, in float32."""
    with torch.inference_mode():
        logits = model(torch.tensor(ids.astype(np.int64))[None]).logits[0, :-1]
    return (
        logits.double()
        .log_softmax(-1)
        .gather(1, torch.tensor(ids[1:].astype(np.int64))[:, None])[:, 0]
        .numpy()
    )


def test_scored_and_weighted_on_both_tokenizers(foreign, tmp_path):
    rows = [{"messages": messages} for messages in conversations()]
    rows.append({"messages": turns("q", "  padded ")})  # Llama's template trims it
    folder = ingested(tmp_path, rows, tokenizer="bundled:initial")
    one = {"engine": "transformers", "dtype": "float32"}
    with writable_store(folder) as store:
        score_policy(store, ScoreSettings(model="bundled:initial", **one), Silent())
        given = ScoreSettings(policy="behavior", model=foreign["byte level"], align="bytes", **one)
        assert score_policy(store, given, Silent()).rejected == 1
        weight(store, WeightSettings(clip_log_ratio=(-3.0, 3.0)), Silent())
    store = open_store(folder)
    batch, read = read_rows(store, foreign["byte level"])
    model = AutoModelForCausalLM.from_pretrained(foreign["byte level"], dtype=torch.float32)
    initial = store.scores["initial"].to_table().to_pylist()
    behavior = store.scores["behavior"].to_table().to_pylist()
    weights = store.sql("select status, weights, log_ratio_sum from weights").to_pylist()
    own_bytes, other_bytes = token_bytes(foreign["bundled"]), token_bytes(foreign["byte level"])
    worst = 0.0
    for index, (row, mine, theirs, weighted) in enumerate(zip(read, initial, behavior, weights, strict=True)):
        if isinstance(row, SampleError):
            assert (theirs["status"], theirs["logprobs"], theirs["span_tokens"]) == ("unaligned", None, None)
            assert weighted["status"] == "unscored"
            continue
        spans = np.array(expected_spans(batch, index, row, own_bytes, other_bytes))
        (sample,) = row.samples
        plain = plain_logprobs(model, sample.input_ids)[sample.loss_mask[1:]]
        want = np.add.reduceat(plain, np.cumsum(spans[:, 1]) - spans[:, 1])
        starts = np.cumsum(spans[:, 0]) - spans[:, 0]
        stored = np.float32(theirs["logprobs"])
        got = np.add.reduceat(stored, starts, dtype=np.float64)
        assert theirs["span_tokens"] == spans[:, 0].tolist()
        assert (stored == np.repeat(stored[starts], spans[:, 0])).all()
        worst = max(worst, float(np.abs(got - want).max()))
        own_sum = np.sum(mine["logprobs"], dtype=np.float64)
        assert weighted["log_ratio_sum"] == pytest.approx(own_sum - plain.sum(), abs=1e-3)
        log_ratio = (np.add.reduceat(np.float64(mine["logprobs"]), starts) - got) / spans[:, 0]
        log_ratio = np.repeat(log_ratio, spans[:, 0])
        again = importance_weights(
            log_ratio,
            np.zeros_like(log_ratio),
            [len(log_ratio)],
            clip_log_ratio=(-3.0, 3.0),
            span_lengths=spans[:, 0],
        )
        np.testing.assert_allclose(weighted["weights"], again, rtol=1e-5)
    print(f"max |difference| of a span's sum {worst:.1e}")
    assert worst <= 1e-4
    assert sum(row["status"] == "ok" for row in behavior) == len(rows) - 1
    stage = store.stage("scores/behavior")
    assert stage.settings["align"] == "bytes"
    assert "spread evenly" in stage.decisions["aligned_by_bytes"]
    assert "another tokenizer" in store.stage("weights/block").decisions["aligned_by_bytes"]
