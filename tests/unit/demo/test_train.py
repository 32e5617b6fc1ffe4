"""The script that makes the assets, on a small scale."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_data.demo import asset, train
from pear_data.demo.countdown import generate, verify
from pear_data.errors import PearError


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_script_makes_the_bundled_tokenizer() -> None:
    _, bundled = train.load(asset("initial"))
    made = train.make_tokenizer(seed=0)
    assert made.get_vocab() == bundled.get_vocab()
    assert made.chat_template == bundled.chat_template
    for text in ("Use each of 2, 5, 6 once to make 60.", "naïve 日本語", "[10,4].\n"):
        assert made(text).input_ids == bundled(text).input_ids


def test_the_same_seed_gives_the_same_policy() -> None:
    _, tokenizer = train.load(asset("initial"))
    first, again, other = (train.make_initial(tokenizer, seed, steps=3).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_bundled_teacher_beats_the_initial_policy() -> None:
    rates = {}
    for name in ("initial", "behavior"):
        torch.manual_seed(0)
        rates[name] = train.pass_rate(*train.load(asset(name)), train.Plan(exam=48))
    assert rates["behavior"] > rates["initial"]


def test_sampled_replies_are_labelled_by_the_verifier() -> None:
    policy, tokenizer = train.load(asset("behavior"))
    rng = random.Random(3)
    questions = {puzzle.prompt: puzzle for puzzle in (generate(rng, 3) for _ in range(16))}
    torch.manual_seed(0)
    rows = train.answer(policy, tokenizer, list(questions.values()), rng)
    assert len(rows) > 8
    for row in rows:
        *_, question, reply = row["messages"]
        assert row["source"] == "countdown-3"
        assert verify(questions[question["content"]], reply["content"]) is (row["label"] == 1)


def test_a_teacher_that_knows_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = train.load(asset("initial"))
    monkeypatch.setattr(train, "MAX_ROUNDS", 1)
    monkeypatch.setattr(train, "QUESTIONS", 4)
    with pytest.raises(PearError, match="train the teacher for longer"):
        train.make_corpus(train.make_initial(tokenizer, seed=0, steps=1), tokenizer, train.Plan())


def test_equal_rows_are_equal_files(tmp_path: Path) -> None:
    with gzip.open(asset("corpus"), "rt", encoding="utf-8") as lines:
        bundled = lines.read()
    written = [tmp_path / "once.gz", tmp_path / "again.gz"]
    for path in written:
        train.write_corpus([json.loads(line) for line in bundled.splitlines()], path)
        assert gzip.decompress(path.read_bytes()).decode() == bundled
    assert written[0].read_bytes() == written[1].read_bytes()


def test_the_far_policy_is_far(tmp_path: Path) -> None:
    """Nearly every log-ratio lies below the lower clip: weights decay by position whatever the content."""
    train.make_far(tmp_path, seed=0)
    with gzip.open(asset("corpus"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:60]
    (far, tokenizer), (teacher, _) = train.load(tmp_path), train.load(asset("behavior"))
    found = train.compare(far, teacher, tokenizer, rows)
    assert found["log_ratios_below_clip"] > 0.8
    assert found["ess_token"] < 0.3
