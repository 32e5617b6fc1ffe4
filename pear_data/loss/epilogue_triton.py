"""The epilogue on CUDA: one kernel turns a chunk of logits into log-probs and gradients, in its own memory.

A program takes a row: it reads it once for the largest logit and the sum of exponentials (online, float32), and a
second time, mostly from the L2 cache, to write the gradient over it.
"""

# Triton reads a kernel's annotations itself and knows only its own.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pear_data.loss.epilogue import Head

_BLOCK = 8192
_WARPS = 16


def gradients_in_place(outputs: Tensor, targets: Tensor, head: Head, weights: Tensor) -> Tensor:
    """Negative log-probs, while `outputs`, of float32 or 16 bits, become the gradients of their weighted sum."""
    return _launch(outputs, targets, head, weights)


def negative_logprobs(outputs: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Negative log-probs; `outputs` stay as they are."""
    return _launch(outputs, targets, head, None)


def _launch(outputs: Tensor, targets: Tensor, head: Head, weights: Tensor | None) -> Tensor:
    rows, vocabulary = outputs.shape
    nll = torch.empty(rows, dtype=torch.float32, device=outputs.device)
    # Triton launches on the current device, and a model split over several has its head elsewhere.
    with torch.cuda.device_of(outputs):  # type: ignore[no-untyped-call]
        _row_kernel[(rows,)](
            outputs,
            outputs.stride(0),
            targets,
            outputs if head.bias is None else head.bias.contiguous(),
            nll if weights is None else weights,
            nll,
            vocabulary,
            float(head.logit_scale),
            1.0 if head.softcap is None else float(head.softcap),
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None,
            GRADIENTS=weights is not None,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=_WARPS,
        )
    return nll


@triton.jit
def _row_kernel(
    outputs,
    stride,
    targets,
    bias,
    weights,
    nll,
    vocabulary,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    # A chunk may hold more than 2**31 logits.
    outputs += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    # A target outside the vocabulary makes the row NaN: nothing can be raised from here.
    fault = tl.where((target >= 0) & (target < vocabulary), 0.0, float("nan"))

    largest = float("-inf")
    total = 0.0
    chosen = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + columns
        known = column < vocabulary
        logit = tl.load(outputs + column, mask=known, other=0.0).to(tl.float32)
        if HAS_BIAS:
            logit += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
        logit *= logit_scale
        if HAS_SOFTCAP:
            logit = softcap * _tanh(logit / softcap)
        chosen += tl.sum(tl.where(column == target, logit, 0.0))
        logit = tl.where(known, logit, float("-inf"))
        now = tl.maximum(largest, tl.max(logit))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(logit - now))
        largest = now
    logsumexp = largest + tl.log(total)
    tl.store(nll + row, logsumexp - chosen + fault)

    if GRADIENTS:
        weight = tl.load(weights + row) * logit_scale + fault
        for start in range(0, vocabulary, BLOCK):
            column = start + columns
            known = column < vocabulary
            logit = tl.load(outputs + column, mask=known, other=0.0).to(tl.float32)
            if HAS_BIAS:
                logit += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
            logit *= logit_scale
            slope = weight
            if HAS_SOFTCAP:
                tanh = _tanh(logit / softcap)
                logit = softcap * tanh
                slope = weight * (1.0 - tanh * tanh)
            gradient = tl.exp(logit - logsumexp) - tl.where(column == target, 1.0, 0.0)
            tl.store(outputs + column, (gradient * slope).to(outputs.dtype.element_ty), mask=known)


@triton.jit
def _tanh(x):
    # Through exp(-2|x|), which neither overflows nor cancels where it matters.
    small = tl.exp(-2.0 * tl.abs(x))
    tanh = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -tanh, tanh)
