"""Tiny random models, a corpus that covers every shape of sample, and the log-probs plain transformers gives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from pear_data.tokens import TokenBatch

VOCAB = 3000
MAX_LENGTH = 2304
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.1,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, head_dim=32, final_logit_softcapping=5.0, sliding_window=64),
    "granite": GraniteConfig(**SIZES, logits_scaling=2.0, attention_multiplier=32**-0.5),
    "cohere": CohereConfig(**SIZES, bos_token_id=1, eos_token_id=2, logit_scale=0.5),
    "gpt2": GPT2Config(
        bos_token_id=1,
        eos_token_id=2,
        vocab_size=VOCAB,
        n_embd=128,
        n_layer=2,
        n_head=4,
        n_positions=MAX_LENGTH,
    ),
}


def save_model(folder: Path, kind: str) -> str:
    """Write a model of `kind` with log-probs that spread over tens of nats; its directory."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.15)
    model.save_pretrained(folder / kind)
    return str(folder / kind)


def batch_of(masks: list[np.ndarray], seed: int = 0) -> TokenBatch:
    """One sample per mask, of ids drawn from the whole vocabulary."""
    offsets = np.concatenate(([0], np.cumsum([len(mask) for mask in masks])))
    ids = np.random.default_rng(seed).integers(0, VOCAB, offsets[-1], dtype=np.int32)
    return TokenBatch([f"s{i}" for i in range(len(masks))], ids, np.concatenate(masks), offsets)


def turns(*lengths: int) -> np.ndarray:
    """Unscored and scored stretches in turn, the first unscored."""
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def corpus() -> TokenBatch:
    """Multi-turn, 1-token, 2,000-token, single-token, unscored, fully scored and longest samples."""
    rng = np.random.default_rng(3)
    random = [turns(*rng.integers(1, 60, size=rng.integers(2, 7))) for _ in range(12)]
    scattered = rng.random(300) < 0.5
    scattered[0] = False
    shapes = [
        turns(5, 1),
        turns(1, 1),
        turns(1),
        turns(30),
        turns(1, 200),
        turns(40, 2000, 3),
        turns(12, 7, 20, 1, 9, 33, 4),
        turns(300, 1, 50),
        scattered,
        turns(MAX_LENGTH - 100, 100),
    ]
    masks = [*random, *shapes]
    return batch_of([masks[i] for i in rng.permutation(len(masks))])


def save_batch(file: Path, batch: TokenBatch) -> str:
    """Write a batch as .npz, for a process of its own to read; the path."""
    np.savez(
        file,
        sample_ids=np.array(batch.sample_ids),
        input_ids=batch.input_ids,
        loss_mask=batch.loss_mask,
        offsets=batch.offsets,
    )
    return str(file)


def reference_logprobs(
    model: str, batch: TokenBatch, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """One sample at a time through plain transformers, eager attention, float64 log-softmax; float64."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
    loaded.to(device).eval()
    pieces = []
    with torch.inference_mode():
        for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
            ids = torch.from_numpy(batch.input_ids[start:end].astype(np.int64)).to(device)
            logprobs = loaded(ids[None]).logits[0, :-1].double().log_softmax(-1)
            chosen = logprobs.gather(1, ids[1:, None])[:, 0].cpu().numpy()
            pieces.append(chosen[batch.loss_mask[start + 1 : end]])
    return np.concatenate(pieces)
