"""What turns a chunk of logits into log-probs and, in its own memory, into their gradients.

On CUDA a Triton kernel reads the chunk twice and writes it once (`epilogue_triton`); elsewhere torch does it in pieces
that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

WeightsOfNll = Callable[[slice, Tensor], Tensor]

# What a core's own cache holds. Smaller pieces are no faster, and wait more often for a core that is busy elsewhere.
_CACHE_BYTES_A_THREAD = 2 << 20
_BLOCK_BYTES_ELSEWHERE = 256 << 20


@dataclass(frozen=True, slots=True)
class Head:
    """An output layer: logits are `logit_scale * (hidden @ weight.T + bias)`, then `softcap * tanh(that / softcap)`."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class RowGradients:
    """`nll` and `weights` [n], and what the rows that `outputs` became must still be multiplied by: `factor` [n], or
    nothing.

    In float32, or float64 for float64. Factors are taken to the rows of smaller matrices, which saves a pass over the
    logits; in 16 bits they would round those once more.
    """

    nll: Tensor
    weights: Tensor
    factor: Tensor | None


def gradients_in_place(
    outputs: Tensor, targets: Tensor, head: Head, weights: Tensor | WeightsOfNll, at_once: bool = False
) -> RowGradients:
    """`outputs` [n, V] of `hidden @ weight.T` become the gradients by them of the sum of `weights` [n] * nll.

    `weights` have the dtype of the statistics. Where they rest on the log-probs, `weights(rows, nll)` is asked for
    them: for one slice of the rows or for several, from the last to the first; `at_once` for all rows.
    """
    dtype = statistics_dtype(outputs.dtype)
    rounds = dtype != outputs.dtype
    if not isinstance(weights, Tensor) and (_in_triton(outputs) or (at_once and rounds)):
        weights = weights(slice(0, len(outputs)), negative_logprobs(outputs, targets, head))
    if _in_triton(outputs):
        from pear_data.loss.epilogue_triton import gradients_in_place as in_one_kernel

        assert isinstance(weights, Tensor)
        return RowGradients(in_one_kernel(outputs, targets, head, weights), weights, None)
    nll = torch.empty(len(outputs), dtype=dtype, device=outputs.device)
    used, sums = torch.empty_like(nll), torch.empty_like(nll)
    for rows in reversed(_blocks(outputs, dtype)):
        values = outputs[rows].to(dtype)
        nll[rows], sums[rows] = _slopes(values, targets[rows], head)
        if rounds:
            used[rows] = weights[rows] if isinstance(weights, Tensor) else weights(rows, nll[rows])
            factor = used[rows] / (sums[rows] / head.logit_scale)
            torch.mul(values, factor[:, None], out=outputs[rows])
    if rounds:
        return RowGradients(nll, used, None)
    used = weights if isinstance(weights, Tensor) else weights(slice(0, len(outputs)), nll)
    return RowGradients(nll, used, used / (sums / head.logit_scale))


def negative_logprobs(outputs: Tensor, targets: Tensor, head: Head) -> Tensor:
    """[n] of `targets` [n] under `outputs` [n, V] of `hidden @ weight.T`, which stay as they are."""
    if _in_triton(outputs):
        from pear_data.loss.epilogue_triton import negative_logprobs as in_one_kernel

        return in_one_kernel(outputs, targets, head)
    nll = torch.empty(len(outputs), dtype=statistics_dtype(outputs.dtype), device=outputs.device)
    for rows in _blocks(outputs, nll.dtype):
        logits = _logits(outputs[rows].to(nll.dtype, copy=True), head)
        nll[rows] = _exponentials(logits, targets[rows])[0]
    return nll


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _slopes(outputs: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Negative log-probs [n] and sums [n]: divided by these, `outputs` became the slopes of nll by scaled outputs."""
    values = _logits(outputs, head)
    slope = None if head.softcap is None else 1 - (values / head.softcap).square_()
    nll, sums = _exponentials(values, targets)
    values.scatter_add_(1, targets[:, None], -sums[:, None])
    if slope is not None:
        values.mul_(slope)
    return nll, sums


def _logits(outputs: Tensor, head: Head) -> Tensor:
    """In the memory of `outputs`."""
    if head.bias is not None:
        outputs.add_(head.bias)
    if head.logit_scale != 1.0:
        outputs.mul_(head.logit_scale)
    if head.softcap is not None:
        outputs.div_(head.softcap).tanh_().mul_(head.softcap)
    return outputs


def _exponentials(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-probs and sums [n] of the exponentials that `logits` become, which are 1 at most."""
    chosen = logits.gather(1, targets[:, None])
    largest = logits.amax(1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(1)
    return sums.log() + (largest - chosen)[:, 0], sums


def _in_triton(outputs: Tensor) -> bool:
    return outputs.is_cuda and outputs.dtype != torch.float64 and find_spec("triton") is not None


def _blocks(outputs: Tensor, dtype: torch.dtype) -> list[slice]:
    rows, vocabulary = outputs.shape
    a_row = vocabulary * dtype.itemsize
    if outputs.device.type == "cpu":
        at_once = max(1, _CACHE_BYTES_A_THREAD // a_row) * torch.get_num_threads()
    else:
        at_once = max(1, _BLOCK_BYTES_ELSEWHERE // a_row)
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]
