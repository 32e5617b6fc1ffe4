"""Two questions put to a model right after loading, since the engine's shortcuts rest on their answers."""

from __future__ import annotations

from typing import Any

import torch

from pear_data.engines.head import BlockedHead
from pear_data.errors import PearError

TOKENS = 8
# Differences allowed relative to the largest value: float32 rounding; one rounding to a 16-bit type and what
# follows from it (a logit scale, a soft cap or an attention to later tokens shows up far above either).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def require_causal(model: Any, name: str) -> None:
    """Raise PearError where a later token changes an earlier row: such a model has no next-token probabilities."""
    ids = _probe(model).repeat(2, 1)
    ids[1, -1] = ids[0, 0]
    first, second = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    if _differ(first, second, TOLERANCE[model.dtype]):
        raise PearError(f"{name}: its rows depend on later tokens, so it is not a causal language model")


def head_reproduces_logits(model: Any, head: BlockedHead) -> bool:
    """Whether `head` on the base model's hidden states gives the logits of the whole model."""
    if model.base_model is model:
        return False
    ids = _probe(model)
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    blocked = head.logits(model.base_model(input_ids=ids, use_cache=False)[0][0])
    return own.shape == blocked.shape and not _differ(own, blocked, TOLERANCE[model.dtype])


def _probe(model: Any) -> torch.Tensor:
    """[1, TOKENS] ids spread over the vocabulary."""
    vocab_size = model.get_input_embeddings().num_embeddings
    return torch.linspace(1, vocab_size - 1, TOKENS, device=model.device).long()[None]


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() > tolerance * one.abs().max())
