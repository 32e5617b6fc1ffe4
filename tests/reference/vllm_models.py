"""What vLLM is tested with beyond the tiny models: grouped samples, large logits, a quantised model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_models import VOCAB, batch_of, turns
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pear_data.tokens import TokenBatch

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": [],
    "config_groups": {
        "group_0": {
            "targets": ["Linear", "re:.*lm_head"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def groups() -> TokenBatch:
    """Several responses to each of three prompts, in any order: some begin alike, two are equal, one scores more."""
    rng = np.random.default_rng(5)
    ids, masks = [], []
    for prompt_length in (290, 256, 140):  # 256: where a block of vLLM's cache ends too
        prompt = rng.integers(0, VOCAB, prompt_length, dtype=np.int32)
        opening = rng.integers(0, VOCAB, 6, dtype=np.int32)
        for shared, own in ((0, 30), (3, 20), (6, 41), (0, 1), (6, 25)):
            response = np.concatenate((opening[:shared], rng.integers(0, VOCAB, own, dtype=np.int32)))
            ids.append(np.concatenate((prompt, response)))
            masks.append(turns(prompt_length, len(response)))
        ids.append(ids[-1])
        masks.append(
            masks[-1] if prompt_length == 290 else turns(40, 60, prompt_length - 90, len(response) - 10)
        )
    order = rng.permutation(len(ids))
    template = batch_of([masks[i] for i in order])
    return TokenBatch(
        template.sample_ids, np.concatenate([ids[i] for i in order]), template.loss_mask, template.offsets
    )


def save_large_logits(qwen2: str, folder: Path) -> str:
    """A model with weights of 16 bits and logits that are large by the same amount: their rounding is the error."""
    model = AutoModelForCausalLM.from_pretrained(qwen2).bfloat16().float()
    with torch.no_grad():
        model.lm_head.weight[:, 0] = 32.0
    model.save_pretrained(folder)
    return str(folder)


def save_quantised(folder: Path) -> tuple[str, str]:
    """Directories of a model of 8-bit weights and activations, head included, and of its weights in plain float32."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    stored = {}
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name.endswith(("proj.weight", "lm_head.weight")):
                scale = weight.abs().amax(dim=1, keepdim=True) / 127
                stored[name] = (weight / scale).round().to(torch.int8)
                stored[name.removesuffix("weight") + "weight_scale"] = scale
                weight.copy_(stored[name] * scale)
            else:
                stored[name] = weight.clone()
    model.save_pretrained(folder / "plain")
    quantised = folder / "quantised"
    quantised.mkdir()
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    plain = json.loads((folder / "plain" / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(plain | {"quantization_config": QUANTIZATION}))
    return str(quantised), str(folder / "plain")
