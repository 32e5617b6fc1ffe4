"""The page on TRL, word for word but for the model and the optimizer: one step against the weights in the store."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.demo import asset

PAGE = Path(__file__).parents[2] / "pear_data" / "hooks" / "trl.md"
ONE_STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def expected_step(store: Any) -> dict[str, torch.Tensor]:
    """The initial policy after one step of lr 1 on sum(w nll) / N, from the store alone, in float64, row by row."""
    model = AutoModelForCausalLM.from_pretrained(asset("initial"), dtype=torch.float64)
    samples, weights = store.corpus.to_table().to_pylist(), store.weights["block"].to_table().to_pylist()
    total = sum(sample["num_scored"] for sample in samples)
    for sample, weighted in zip(samples, weights, strict=True):
        ids, mask = torch.tensor(sample["input_ids"]), torch.tensor(sample["loss_mask"])
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        (-(logprobs[mask[1:]] * torch.tensor(weighted["weights"])).sum() / total).backward()
    return {name: (p - p.grad).detach() for name, p in model.named_parameters()}


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    corpus = [str(asset("corpus")), "--limit", "16", "--engine", "transformers"]
    assert run(["score", *corpus, "--model", str(asset("initial"))]) == 0
    behavior = ["--policy", "behavior", "--model", str(asset("behavior")), "--engine", "transformers"]
    assert run(["score", *behavior]) == 0
    assert run(["weight", "--level", "block"]) == 0
    expected = expected_step(open_store("pear_store"))
    names: dict[str, Any] = {"ONE_STEP": ONE_STEP}
    steps = 0
    for language, block in re.findall(r"```(python)?\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if not language:
            assert run(shlex.split(block)[1:]) == 0
            continue
        code = block.replace("Qwen/Qwen2.5-7B-Instruct", str(asset("initial")))
        exec(code.replace("learning_rate=1e-5", "**ONE_STEP"), names)
        after = dict(names["trainer"].model.named_parameters())
        steps += 1
        assert max(float((after[n].double() - expected[n]).abs().max()) for n in expected) <= 2e-6
    assert steps == 3
