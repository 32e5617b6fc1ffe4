"""LoRA and prompt tuning through make_sft_trainer: one SGD step against sum(w * nll) / N in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig

from pear_data.demo import asset
from pear_data.hooks.trl import make_sft_trainer

TOLERANCE = 2e-6
VOCAB = 416


def make_rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length in (5, 9, 14, 22):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        scored = torch.arange(length) >= 3
        weights = 3 * torch.rand(length, generator=generator) * scored
        labels = torch.where(scored, ids, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "loss_weights": weights.tolist()})
    return rows


ROWS = make_rows()
CONFIGS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, lora_dropout=0.0),
    "prompt_tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def make_model() -> Qwen2ForCausalLM:
    torch.manual_seed(3)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}


def expected(model: nn.Module) -> dict[str, Tensor]:
    """What one step leaves of the trained parameters; the last logits of a row are those of its own tokens."""
    exact = copy.deepcopy(model).double().train()
    total = torch.zeros((), dtype=torch.float64)
    for row in ROWS:
        ids = torch.tensor(row["input_ids"])
        logprobs = exact(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :].log_softmax(-1)
        for t, weight in enumerate(row["loss_weights"]):
            if row["labels"][t] != -100:
                total = total - weight * logprobs[t - 1, ids[t]]
    (total / sum(label != -100 for row in ROWS for label in row["labels"])).backward()
    return {name: p.detach() - p.grad for name, p in exact.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("kind", "padding_free"), [("lora", False), ("lora", True), ("prompt_tuning", False)]
)
def test_one_step_of_an_adapter_is_the_formula(kind: str, padding_free: bool, tmp_path: Path) -> None:
    args = SFTConfig(
        output_dir=str(tmp_path),
        padding_free=padding_free,
        max_length=None,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    model = peft.get_peft_model(make_model(), CONFIGS[kind])
    before, want = trainable(model), expected(model)
    make_sft_trainer(
        model,
        args,
        datasets.Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(asset("initial")),
    ).train()
    after = trainable(model)
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 0.01
    assert max(float((after[name] - want[name]).abs().max()) for name in want) <= TOLERANCE
