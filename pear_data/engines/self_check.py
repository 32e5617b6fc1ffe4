"""Questions put to a model right after loading, since the engine's shortcuts rest on their answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pear_data.engines.head import BlockedHead
from pear_data.engines.packed_attention import NAME, CannotPackError, Layout, packed
from pear_data.engines.packing import Group, lay_out
from pear_data.errors import PearError
from pear_data.tokens import TokenBatch

TOKENS = 8
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
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


def use_packed_attention(model: Any) -> bool:
    """Switch `model` to packed attention where that reproduces its own, and say whether it does.

    It does not for models that bypass transformers' attention registry, carry a state from token to token, or cut
    their context into chunks.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= PACKABLE_LAYERS or not model._can_set_attn_implementation():
        return False
    ids = _probe(model)[0]
    own = model.config._attn_implementation
    # One sample alone, and two that go on from one prompt: every kind of sequence that a pack holds.
    samples = [ids, ids.flip(0), torch.cat([ids.flip(0)[: TOKENS // 2], ids[: TOKENS // 2]])]
    alone = [model.base_model(input_ids=sample[None], use_cache=False)[0][0].float() for sample in samples]
    model.set_attn_implementation(NAME)
    try:
        together = _packed_probe(model, samples)
    except (CannotPackError, TypeError):
        together = None
    if together is None or any(
        _differ(one, other, TOLERANCE[model.dtype]) for one, other in zip(alone, together, strict=True)
    ):
        model.set_attn_implementation(own)
        return False
    return True


def _packed_probe(model: Any, samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states of each sample, [TOKENS, hidden], the last two sharing their first half in one pack."""
    half = TOKENS // 2
    batch = TokenBatch(
        ["a", "b", "c"],
        torch.cat(samples).cpu().numpy().astype(np.int32),
        np.tile(np.arange(TOKENS) >= half, 3),
        np.arange(4) * TOKENS,
    )
    groups = [Group(np.array([0]), 0, TOKENS), Group(np.array([1, 2]), half, TOKENS + half)]
    pack = lay_out(batch, np.full(3, TOKENS), groups)
    with packed(Layout.of(pack, model.device.type)):
        hidden = model.base_model(
            input_ids=torch.from_numpy(pack.input_ids)[None].to(model.device),
            position_ids=torch.from_numpy(pack.positions)[None].to(model.device),
            use_cache=False,
        )[0][0].float()
    alone, prompt, first, second = hidden.split(pack.lengths.tolist())
    return [alone, torch.cat([prompt, first]), torch.cat([prompt, second])]


def _probe(model: Any) -> torch.Tensor:
    """[1, TOKENS] ids spread over the vocabulary."""
    vocab_size = model.get_input_embeddings().num_embeddings
    return torch.linspace(1, vocab_size - 1, TOKENS, device=model.device).long()[None]


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() > tolerance * one.abs().max())
