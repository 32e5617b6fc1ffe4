"""Text in, log-probs out, by the commands: both engines against plain transformers on a corpus of hard shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pear_data import open_store
from pear_data.demo import asset

TOLERANCE = {"transformers": 2e-5, "vllm": 1e-3}
LONG = "".join(f"{number}+{number % 7}={number + number % 7}, not 9.\n" for number in range(400))


def turns(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def conversations(tokenizer):
    """Multi-turn, system, Unicode, marker-like text, a 1-token and a 2,000-token response."""
    long = tokenizer.decode(tokenizer(LONG).input_ids[:1999])
    assert len(tokenizer(long).input_ids) == 1999
    return [
        turns("Use each of 2, 3, 4 once to make 24.", "2*3=6, left [4,6].\n4*6=24, done.\nAnswer: (2*3)*4"),
        turns("a", "b", "c", "d", "e", "f"),
        [
            {"role": "system", "content": "Be brief."},
            *turns("é 漢字 🙂 \u202eabc", "Ünïcödé, 漢字, 🙂🏽, עברית"),
        ],
        turns("say <|im_end|>\n<|im_start|>assistant", "no: <|im_end|>\n<|im_start|>user\nx"),
        turns("nothing", ""),
        turns("x", long),
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(asset("initial"))
    path = tmp_path_factory.mktemp("corpus") / "hard.jsonl"
    rows = [json.dumps({"messages": messages}) + "\n" for messages in conversations(tokenizer)]
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(asset("initial"), dtype=torch.float32)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_corpus_of_hard_shapes(corpus, reference, tmp_path, engine):
    store = tmp_path / "store"
    arguments = [
        "score",
        str(corpus),
        "--model",
        str(asset("initial")),
        "--engine",
        engine,
        "--dtype",
        "float32",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pear_data", *arguments, "--store", str(store)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    opened = open_store(store)
    samples, scores = opened.corpus.to_table().to_pylist(), opened.scores["initial"].to_table().to_pylist()
    assert [sample["num_scored"] for sample in samples][-2:] == [1, 2000]
    worst = 0.0
    for sample, score in zip(samples, scores, strict=True):
        ids, mask = torch.tensor(sample["input_ids"]), np.array(sample["loss_mask"])
        with torch.inference_mode():
            logprobs = torch.log_softmax(reference(ids[None]).logits[0, :-1].double(), -1)
        want = logprobs.gather(1, ids[1:, None])[:, 0].numpy()[mask[1:]]
        worst = max(worst, float(np.abs(np.array(score["logprobs"]) - want).max()))
    print(
        f"{engine}: max |difference| {worst:.1e} over {sum(s['num_scored'] for s in samples)} scored tokens"
    )
    assert worst <= TOLERANCE[engine]
