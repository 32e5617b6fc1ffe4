"""The pages on transformers and on loops of one's own, word for word but for model, precision and optimizer.

Every training on them is one step over all rows, compared with the weights in the store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from one_step import Sample, largest_difference, parameters_after, stored_samples
from pages import blocks, words
from torch import Tensor
from transformers import AutoModelForCausalLM

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.demo import asset
from pear_data.loss import PearCollator, denominator

TOLERANCE = 2e-6
LEARNING_RATE = 0.05  # weights are 15 on average here, and float32 has no more digits for larger steps
ONE_STEP: dict[str, Any] = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
INSTEAD = {
    "Qwen/Qwen2.5-7B-Instruct": str(asset("initial")),
    "learning_rate=1e-5": "**ONE_STEP",
    "bf16=True, ": "",
    "bf16=True,\n": "\n",
    "torch.optim.AdamW(model.parameters(), lr=1e-5)": f"torch.optim.SGD(model.parameters(), lr={LEARNING_RATE})",
    "dtype=torch.bfloat16": "enabled=False",
    'mixed_precision="bf16"': "cpu=True",
}


@pytest.fixture
def samples(weighted_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """In a folder of its own, where the commands find the store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEAR_STORE", str(weighted_store))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return stored_samples(open_store(weighted_store), "block")


def expected_step(samples: list[Sample], divisor: float) -> dict[str, Tensor]:
    after = parameters_after(asset("initial"), [(sample, LEARNING_RATE / divisor) for sample in samples])
    assert largest_difference(after, parameters_after(asset("initial"), [(samples[0], 0.0)])) > 1e-3
    return after


def trained(code: str, names: dict[str, Any]) -> dict[str, Tensor]:
    for there, here in INSTEAD.items():
        code = code.replace(there, here)
    exec(code, names)
    model = names["trainer"].model if "trainer" in names else names["model"]
    return {name: p.detach() for name, p in model.named_parameters()}


def test_transformers(samples: list[Sample]) -> None:
    labels, mass = sum(sample.num_scored for sample in samples), sum(sample.mass for sample in samples)
    by_labels, by_weights = expected_step(samples, labels), expected_step(samples, mass)
    for export in blocks("transformers"):
        assert run(words(export)[1:]) == 0
    plain, packed, live, pear_trainer = blocks("transformers", "python")
    names: dict[str, Any] = {"ONE_STEP": ONE_STEP}
    for code, expected in [
        (plain, by_labels),
        (packed, by_labels),
        (live, by_labels),
        (pear_trainer, by_weights),
    ]:
        assert largest_difference(trained(code, names), expected) <= TOLERANCE


def test_readme_has_the_page_on_transformers() -> None:
    assert blocks("transformers", "python")[0] in blocks("README", "python")


def test_loops(samples: list[Sample]) -> None:
    labels = sum(sample.num_scored for sample in samples)
    expected = expected_step(samples, labels)
    (export,) = blocks("pytorch")
    assert run(words(export)[1:]) == 0
    plain, accelerate, own = blocks("pytorch", "python")
    for code in (plain, accelerate):
        assert largest_difference(trained(code, {}), expected) <= TOLERANCE
    model = AutoModelForCausalLM.from_pretrained(asset("initial"), dtype=torch.float32)

    def backbone(batch: dict[str, Any]) -> Tensor:
        hidden: Tensor = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return hidden

    names: dict[str, Any] = {"model": model, "backbone": backbone, "head": model.lm_head}
    trained(own, names)
    batch = PearCollator(0)(datasets.load_dataset("weighted", split="train").to_list())
    names["loss_of"](batch, denominator(batch)).backward()
    found = {name: p.detach() - LEARNING_RATE * p.grad for name, p in model.named_parameters()}
    assert largest_difference(found, expected) <= TOLERANCE
