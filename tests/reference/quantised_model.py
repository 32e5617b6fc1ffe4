"""A tiny model of 8-bit weights and activations, head included, as `compressed-tensors` stores it, and in float32."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import VOCAB
from transformers import LlamaConfig, LlamaForCausalLM

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


def save_quantised(folder: Path) -> tuple[str, str]:
    """Directories of the quantised model and of a float32 one whose weights are those the quantised one stands for."""
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
