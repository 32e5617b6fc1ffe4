"""Causal attention over packed sequences, for models that look their attention up in transformers' registry.

Sequences lie back to back; each attends to its own past and, where it goes on from a shared prompt, to that. No mask of
the pack's size and no padding ever exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pear_data.engines.packing import Pack

_varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn
except ImportError:  # before torch 2.10
    _varlen_attn = None

NAME = "pear_packed"
QUERY_BLOCK = 512  # rows of scores formed at once where no fused kernel computes what a model asks for
VARLEN_HEAD_DIM = 256  # the widest head of the variable-length kernel
# What models pass along without meaning another result here: positions and caches are the engine's.
_IMMATERIAL = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}


class CannotPackError(Exception):
    """The model's attention asks for something that packed attention does not compute."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the sequences of a pack are, for the attention of every layer."""

    sequences: list[tuple[int, int, int, int]]  # start, length, prefix start, prefix length; none empty
    keys: torch.Tensor | None  # the rows each sequence attends to, back to back; None: its own and no other
    query_offsets: torch.Tensor  # [s + 1], int32
    key_offsets: torch.Tensor  # [s + 1], int32
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, pack: Pack, device: str) -> Layout:
        columns = (pack.starts, pack.lengths, pack.prefix_starts, pack.prefix_lengths)
        table = zip(*(column.tolist() for column in columns), strict=True)
        sequences = [line for line in table if line[1]]
        queries = [length for _, length, _, _ in sequences]
        keys = [length + prefix for _, length, _, prefix in sequences]
        return cls(
            sequences=sequences,
            keys=_key_rows(sequences).to(device) if pack.prefix_lengths.any() else None,
            query_offsets=_offsets(queries).to(device),
            key_offsets=_offsets(keys).to(device),
            longest_query=max(queries),
            longest_key=max(keys),
        )


_layout: ContextVar[Layout] = ContextVar("layout")


@contextmanager
def packed(layout: Layout) -> Iterator[None]:
    """Forward passes inside the block are over a pack of this layout."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' registry: query [1, heads, M, d] to output [1, M, heads, d].

    `s_aux` [heads] are attention sinks, logits without a value.

    Raises CannotPackError for an option that would change the result and is not known here.
    """
    unknown = [name for name, given in options.items() if given is not None and name not in _IMMATERIAL]
    if attention_mask is not None or unknown:
        raise CannotPackError(f"attention with {unknown[0] if unknown else 'a mask'}")
    layout = _layout.get()
    if softcap is None and s_aux is None and _has_varlen_kernel(query, value):
        return _varlen(query, key, value, layout, scaling, sliding_window)[None], None
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    for start, length, prefix_start, prefix in layout.sequences:
        q = query[:, :, start : start + length]
        k, v = key[:, :, start : start + length], value[:, :, start : start + length]
        if prefix:
            shared = slice(prefix_start, prefix_start + prefix)
            k, v = torch.cat([key[:, :, shared], k], 2), torch.cat([value[:, :, shared], v], 2)
        if softcap is None and s_aux is None:
            found = _fused(q, k, v, scaling, sliding_window)
        else:
            found = _explicit(q, k, v, scaling, sliding_window, softcap, s_aux)
        output[:, start : start + length] = found.transpose(1, 2)
    return output, None


def _has_varlen_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= VARLEN_HEAD_DIM
        and _varlen_attn is not None
    )


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One kernel for all sequences; its causal mask is aligned to the end of the keys."""
    assert _varlen_attn is not None
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if layout.keys is not None:
        k, v = k[layout.keys], v[layout.keys]
    found: torch.Tensor = _varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layout.query_offsets,
        layout.key_offsets,
        layout.longest_query,
        layout.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return found


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    queries, keys = query.shape[2], key.shape[2]
    narrow = window is not None and window < keys
    mask = _mask(queries, keys, window, query.device) if narrow or queries != keys else None
    found: torch.Tensor = scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return found


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with its scores written out, a block of query rows at a time."""
    heads, before = query.shape[1], key.shape[2] - query.shape[2]
    key, value = (states.repeat_interleave(heads // key.shape[1], 1) for states in (key, value))
    blocks = []
    for start in range(0, query.shape[2], QUERY_BLOCK):
        block = query[:, :, start : start + QUERY_BLOCK]
        end = before + start + block.shape[2]
        scores = (block @ key[:, :, :end].mT * (scaling or 1 / math.sqrt(query.shape[-1]))).float()
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores.masked_fill_(~_mask(block.shape[2], end, window, query.device), -torch.inf)
        if sinks is not None:
            column = sinks.float().view(1, heads, 1, 1).expand(1, heads, block.shape[2], 1)
            scores = torch.cat([scores, column], -1)
        shares = scores.softmax(-1)[..., :end].to(value.dtype)
        blocks.append(shares @ value[:, :, :end])
    return torch.cat(blocks, 2)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """What the last `queries` of `keys` tokens see, [queries, keys]: themselves and the window before them."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def _key_rows(sequences: list[tuple[int, int, int, int]]) -> torch.Tensor:
    rows = []
    for start, length, prefix_start, prefix in sequences:
        rows += [torch.arange(prefix_start, prefix_start + prefix), torch.arange(start, start + length)]
    return torch.cat(rows)


def _offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


AttentionInterface.register(NAME, packed_attention)
