"""What the plan says a model costs: parameters against the model itself, FLOPs against torch's own counter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from pear_data.stages.model_size import model_size

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXTURES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2),
    "deepseek-v3": DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=24,
    ),
}
ALL = CONFIGS | MIXTURES
TOKENS = 200
LEARNT_POSITIONS = {"gpt2": CONFIGS["gpt2"].n_positions * CONFIGS["gpt2"].n_embd}


@pytest.mark.parametrize("kind", ALL)
def test_parameters_are_exact_and_flops_are_those_torch_counts(kind: str) -> None:
    size = model_size(ALL[kind], False)
    model = AutoModelForCausalLM.from_config(
        ALL[kind], attn_implementation="eager", experts_implementation="eager"
    ).eval()
    assert size.parameters == model.num_parameters()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert size.head == (0 if head is embedding else head.numel())
    assert size.embedding - embedding.numel() == LEARNT_POSITIONS.get(kind, 0)
    assert size.body == size.parameters - size.embedding - size.head

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 900, (1, TOKENS)), use_cache=False)
    counted = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    attention = counted.pop("aten.bmm")
    flops = size.flops(np.array([TOKENS]), np.array([TOKENS]))
    assert flops.body + flops.head == pytest.approx(sum(counted.values()), rel=0.01)
    # Eager attention computes the whole square of scores; what the plan counts is its lower triangle (or a band).
    triangles = [_seen(TOKENS, window) for window in size.windows.elements()]
    assert flops.attention == pytest.approx(
        attention * sum(triangles) / (len(triangles) * TOKENS**2), rel=0.02
    )


def _seen(length: int, window: int | None) -> int:
    return sum(min(position + 1, window or length) for position in range(length))


def test_windows_are_counted_by_layer_and_sample() -> None:
    size = model_size(CONFIGS["gemma2"], False)
    assert dict(size.windows) == {64: 1, None: 1}
    lengths = np.array([1, 63, 64, 65, 300])
    pairs = sum(_seen(int(length), window) for length in lengths for window in (64, None))
    assert size.flops(lengths, lengths).attention == 2 * (128 + 128) * pairs
    assert size.kv_entries == 2 * 2 * 2 * 32
    gemma3 = Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6}, head_dim=16, sliding_window=8)
    assert dict(model_size(gemma3, False).windows) == {8: 5, None: 1}


def test_only_scored_tokens_pay_for_the_head() -> None:
    size = model_size(CONFIGS["qwen2"], False)
    all_tokens, some = (size.flops(np.array([50]), np.array([n])) for n in (50, 10))
    assert some.head == all_tokens.head / 5 == 2 * 10 * 3000 * 128
    assert some.body == all_tokens.body
    assert (some + some).total == pytest.approx(2 * some.total)
