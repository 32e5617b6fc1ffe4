"""What turns a chunk of logits into log-probs, and then into the gradients of the weighted loss, in its own memory.

On CUDA a Triton kernel does each in one pass (`epilogue_triton`); elsewhere torch does it in pieces that stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """float32 [n] each (float64 for float64 logits)."""

    nll: Tensor
    logsumexp: Tensor


def negative_logprobs(logits: Tensor, targets: Tensor, softcap: float | None) -> RowStatistics:
    """Of `targets` [n] under `logits` [n, V], which stay as they are, the soft-cap not yet applied."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logsumexp = torch.empty(len(logits), dtype=dtype, device=logits.device)
    for block in _blocks(logits):
        capped = logits[block].to(dtype)
        if softcap is not None:
            capped = softcap * torch.tanh(capped / softcap)
        torch.logsumexp(capped, -1, out=logsumexp[block])
    chosen = logits.gather(1, targets[:, None])[:, 0].to(dtype)
    if softcap is not None:
        chosen = softcap * torch.tanh(chosen / softcap)
    return RowStatistics(logsumexp - chosen, logsumexp)


def gradients_in_place(
    logits: Tensor,
    targets: Tensor,
    known: RowStatistics,
    weights: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """`logits` [n, V] become the gradients of sum(weights * nll) by the head's output, before scale and soft-cap."""
    factors = weights * logit_scale
    for block in _blocks(logits):
        piece = logits[block]
        values = piece.to(weights.dtype)
        slope = None
        if softcap is not None:
            tanh = torch.tanh(values / softcap)
            values, slope = tanh * softcap, 1 - tanh * tanh
        values.sub_(known.logsumexp[block, None]).exp_()
        index = targets[block, None]
        values.scatter_add_(1, index, values.new_full((1, 1), -1.0).expand_as(index))
        values.mul_(factors[block, None])
        if slope is not None:
            values.mul_(slope)
        if values is not piece:
            piece.copy_(values)


def _blocks(logits: Tensor) -> list[slice]:
    rows = len(logits)
    if logits.is_cuda:
        return [slice(0, rows)]
    at_once = max(1, _BLOCK_BYTES // (logits.shape[1] * 4))
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]
