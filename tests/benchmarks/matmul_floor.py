"""The matrix multiplications that scoring cannot avoid, bare: the floor under every method's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pear_data.tokens import TokenBatch

ROWS = {"cpu": 1024, "cuda": 16384}
VOCABULARY_BLOCK = {"cpu": 1024, "cuda": 16384}


def matmul_floor(folder: str, dtype: str, device: str) -> Callable[[TokenBatch], None]:
    """A function that multiplies what scoring a batch multiplies, on random numbers of the model's shapes.

    Every linear layer on every token before the last scored one, 1,024 at a time; the head on the rows that predict
    scored tokens; and of attention the two products, each half of a square.
    """
    import torch

    config, body, head_shape = _shapes(folder)
    kind: Any = {"dtype": getattr(torch, dtype), "device": device}
    head = torch.randn(head_shape, **kind)
    weights = {shape: torch.randn(shape, **kind) for shape in set(body)}
    heads, depth = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    full = {width: torch.randn(ROWS[device], width, **kind) for width in {shape[1] for shape in body}}
    query = torch.randn(heads, config.max_position_embeddings, depth, **kind)

    def rows(count: int, width: int) -> list[torch.Tensor]:
        return [full[width][: count - first] for first in range(0, count, ROWS[device])]

    def run(batch: TokenBatch) -> None:
        needed = _needed(batch)
        inputs = {width: rows(sum(needed), width) for width in {shape[1] for shape in body}}
        with torch.inference_mode():
            for shape in body:
                for chunk in inputs[shape[1]]:
                    torch.mm(chunk, weights[shape].T)
            for chunk in rows(int(batch.loss_mask.sum()), head.shape[1]):
                for first in range(0, len(head), VOCABULARY_BLOCK[device]):
                    torch.mm(chunk, head[first : first + VOCABULARY_BLOCK[device]].T)
            for length in needed:
                # Causal: half the keys stand for the half of the square that is needed.
                keys = query[:, : (length + 1) // 2]
                for _ in range(config.num_hidden_layers):
                    torch.bmm(torch.bmm(query[:, :length], keys.mT), keys)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def matmul_flops(folder: str, batch: TokenBatch) -> float:
    """Floating-point operations of those products."""
    config, body, head = _shapes(folder)
    needed = np.array(_needed(batch), dtype=np.float64)
    layers = 2 * needed.sum() * sum(float(np.prod(shape)) for shape in body)
    attention = 2 * config.num_hidden_layers * config.hidden_size * float((needed**2).sum())
    return float(layers + attention + 2 * batch.loss_mask.sum() * np.prod(head))


def _shapes(folder: str) -> tuple[Any, list[tuple[int, ...]], tuple[int, ...]]:
    """The configuration, the shape of every linear layer of the body, and that of the head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    body = [tuple(m.weight.shape) for m in meta.base_model.modules() if isinstance(m, torch.nn.Linear)]
    return config, body, tuple(meta.get_output_embeddings().weight.shape)


def _needed(batch: TokenBatch) -> list[int]:
    """Tokens of each sample before its last scored one."""
    return [int(np.flatnonzero(mask)[-1]) for mask in np.split(batch.loss_mask, batch.offsets[1:-1])]
