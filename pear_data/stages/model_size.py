"""What a causal language model costs, from its configuration alone: parameters, FLOPs and memory.

Of a sample with T tokens, S of them scored (a multiply-add counts as 2 FLOPs):

    body        2 T x parameters of the layers' matrices, of a mixture of experts those a token passes through
    attention   2 (d_qk + d_v) x pairs of tokens that see each other, per layer; d over all heads
    head        2 S x vocabulary x hidden size

Norms, rotations, activations and recurrent states are left out; they are small next to these.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of scoring, by where they are spent."""

    body: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.body + self.attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.body + other.body, self.attention + other.attention, self.head + other.head)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of one model. Parameters shared between places are counted once, with the embedding."""

    parameters: int
    embedding: int  # of tokens and, where they are learnt, positions
    head: int  # 0 where the head is the token embedding
    multiplied: int  # entries of the body's matrices that a token is multiplied with
    head_multiplied: int  # the same of the head: vocabulary x hidden size
    windows: Counter[int | None]  # attention layers by the tokens each position sees; None: all before it
    qk_size: int  # width of all heads' queries
    v_size: int  # width of all heads' values
    kv_entries: int  # keys and values of one token, all layers
    hidden: int
    intermediate: int
    vocabulary: int

    @property
    def body(self) -> int:
        return self.parameters - self.embedding - self.head

    def flops(self, num_tokens: Counts, head_tokens: Counts) -> Flops:
        """FLOPs of samples with these tokens [n], of which these go through the head [n]."""
        pairs = sum(count * float(_pairs(num_tokens, window).sum()) for window, count in self.windows.items())
        return Flops(
            2.0 * self.multiplied * float(num_tokens.sum()),
            2.0 * (self.qk_size + self.v_size) * pairs,
            2.0 * self.head_multiplied * float(head_tokens.sum()),
        )

    def activation_entries(self, tokens: int) -> int:
        """Numbers alive at once in a forward pass over `tokens` tokens: within a quarter of what a CPU took."""
        return tokens * (6 * self.hidden + 2 * (self.qk_size + self.v_size) + 4 * self.intermediate)


def model_size(config: Any, trust_remote_code: bool) -> ModelSize:
    """Sizes of the causal language model of a transformers configuration; no weight is read or allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    embeddings = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
    }
    head = model.get_output_embeddings().weight
    own_head = 0 if id(head) in embeddings else head.numel()
    body = [p for p in model.parameters() if id(p) not in embeddings and p is not head]
    heads = getattr(text, "num_attention_heads", None) or 0
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    windows = _windows(text) if heads else Counter()
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=sum(embeddings.values()),
        head=own_head,
        multiplied=round(sum(_multiplied(p, text) for p in body)),
        head_multiplied=head.numel(),
        windows=windows,
        qk_size=heads * (getattr(text, "qk_head_dim", None) or head_dim),
        v_size=heads * (getattr(text, "v_head_dim", None) or head_dim),
        kv_entries=_kv_entries(text, heads, head_dim) * windows.total(),
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=head.shape[0],
    )


def _multiplied(parameter: torch.Tensor, text: Any) -> float:
    """Entries a token is multiplied with: none of a vector, of stacked experts those of the chosen ones."""
    if parameter.ndim < 2:
        return 0
    experts = getattr(text, "num_local_experts", None) or 0
    is_stack = parameter.ndim == 3 and parameter.shape[0] == experts
    return parameter.numel() * (float(text.num_experts_per_tok) / float(experts) if is_stack else 1.0)


def _windows(text: Any) -> Counter[int | None]:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        uses_window = getattr(text, "use_sliding_window", True)
        return Counter({window if uses_window else None: text.num_hidden_layers})
    seen = {"full_attention": None, "sliding_attention": window}
    return Counter(seen[kind] for kind in kinds if kind in seen)


def _kv_entries(text: Any, heads: int, head_dim: int) -> int:
    """Keys and values of one token in one layer; of multi-head latent attention the latent that stands for them."""
    latent = getattr(text, "kv_lora_rank", None)
    if latent:
        return int(latent + text.qk_rope_head_dim)
    return 2 * head_dim * (getattr(text, "num_key_value_heads", None) or heads)


def _pairs(num_tokens: Counts, window: int | None) -> Floats:
    """Pairs (token, token it sees) of each sample, [n]: the lower triangle, or a band of it."""
    length = num_tokens.astype(np.float64)
    band = length if window is None else np.minimum(length, window)
    pairs: Floats = band * (band + 1) / 2 + (length - band) * band
    return pairs
