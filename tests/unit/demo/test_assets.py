"""The bundled assets are what they claim to be: small, loadable, labelled right, near enough to each other."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pear_data.demo import asset
from pear_data.demo.countdown import Puzzle, verify
from pear_data.demo.curriculum import held_out

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    with gzip.open(asset("corpus"), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def claims() -> dict[str, Any]:
    claims: dict[str, Any] = json.loads((asset("corpus").parent / "training.json").read_text())
    return claims


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(asset("initial"), local_files_only=True)


@pytest.fixture(scope="module")
def logprobs(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, list[np.ndarray]]:
    """Log-probs of the replies of every sixth row, in plain transformers, one row at a time."""
    return {
        name: [_score(_model(name), tokenizer, row) for row in rows[::6]] for name in ("initial", "behavior")
    }


def _model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        asset(name), dtype=torch.float32, local_files_only=True
    ).eval()


def _score(model: Any, tokenizer: Any, row: dict[str, Any]) -> np.ndarray:
    whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    prompt = tokenizer.apply_chat_template(
        row["messages"][:-1], add_generation_prompt=True, return_dict=False
    )
    assert whole[: len(prompt)] == prompt
    ids = torch.tensor(whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)])
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(1, ids[1:, None])[len(prompt) - 1 :, 0].numpy()


def test_sizes() -> None:
    files = [path for path in asset("corpus").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < 4 * MEGABYTE
    assert sum(path.stat().st_size for path in files) < 5 * MEGABYTE


def test_every_row_is_what_its_label_says(rows: list[dict[str, Any]]) -> None:
    assert 400 <= len(rows) <= 600
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"id", "source", "messages", "label"}
        *context, question, reply = row["messages"]
        assert [message["role"] for message in context] in ([], ["system"])
        assert (question["role"], reply["role"]) == ("user", "assistant")
        puzzle = Puzzle.from_prompt(question["content"])
        assert row["source"] == f"countdown-{len(puzzle.numbers)}"
        assert verify(puzzle, reply["content"]) is (row["label"] == 1)
        assert held_out(puzzle)
    assert 0.04 < [row["label"] for row in rows].count(-1) / len(rows) < 0.15
    assert {row["source"] for row in rows} == {"countdown-3", "countdown-4"}


def test_no_prompt_twice(rows: list[dict[str, Any]]) -> None:
    assert len({row["messages"][-2]["content"] for row in rows}) == len(rows)


def test_rows_tokenize_alike_under_both_policies(rows: list[dict[str, Any]], tokenizer: Any) -> None:
    for path in asset("initial").glob("*token*"):
        assert path.read_bytes() == (asset("behavior") / path.name).read_bytes()
    assert (asset("initial") / "chat_template.jinja").read_bytes() == (
        asset("behavior") / "chat_template.jinja"
    ).read_bytes()
    text = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert text.startswith("<|im_start|>")
    assert text.endswith("<|im_end|>\n")


@pytest.mark.parametrize(
    "text", ["naïve 日本語 \U0001f600\r\n\t x", "a\x00b", "\u202e<|endoftext|>", " " * 9]
)
def test_any_text_can_be_encoded(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_claims_hold_on_a_subsample(logprobs: dict[str, list[np.ndarray]], claims: dict[str, Any]) -> None:
    target, behavior = (np.concatenate(logprobs[name]) for name in ("initial", "behavior"))
    inside = np.mean((target - behavior >= -0.08) & (target - behavior <= 0.3))
    assert inside == pytest.approx(claims["log_ratios_inside_clips"], abs=0.04)
    assert np.exp(-target.mean()) == pytest.approx(claims["initial_perplexity"], rel=0.1)
    assert np.exp(-behavior.mean()) == pytest.approx(claims["behavior_perplexity"], rel=0.1)
    assert behavior.mean() > target.mean()


def test_the_policies_are_near_but_not_the_same(claims: dict[str, Any]) -> None:
    assert 0.4 <= claims["log_ratios_inside_clips"] <= 0.9
    assert 0.3 <= claims["ess_token"] <= 0.9
    assert 0.3 <= claims["ess_block"] <= 0.9
    assert claims["behavior_pass_rate"] > claims["initial_pass_rate"] + 0.1


def test_the_corpus_is_what_the_teacher_would_say(logprobs: dict[str, list[np.ndarray]]) -> None:
    """At temperature 1 a sample's surprise is its entropy; text of another origin would stand out."""
    per_token = np.array([sample.mean() for sample in logprobs["behavior"]])
    assert per_token.min() > -2.0


def test_finding_an_asset_imports_nothing_heavy() -> None:
    code = "import sys; from pear_data.demo import asset; print(asset('corpus')); print(*sys.modules)"
    path, modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert Path(path) == asset("corpus")
    assert not {"torch", "transformers", "numpy", "polars", "duckdb"} & set(modules.split())


def test_other_names_are_refused() -> None:
    with pytest.raises(KeyError):
        asset("nothing")  # type: ignore[arg-type]  # the point of the test
