"""Output head and weighted loss in one: hidden states in, loss and gradients out, the logits never whole.

Rows go through the head in chunks. A chunk's logits turn into their own gradients in one buffer, so that three matrix
multiplies (logits, gradient of the hidden states, gradient of the head) and that buffer are all it costs. Rows that
cannot matter, because they are ignored or weigh nothing, are left out before the first multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pear_data.loss.epilogue import gradients_in_place, negative_logprobs

WeightsOfRows = Callable[[Tensor, Tensor], Tensor]

_CHUNK_BYTES = {"cpu": 192 << 20, "cuda": 768 << 20}


def linear_weighted_nll(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor | WeightsOfRows,
    *,
    denom: Tensor | float,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "ours",
    chunk_rows: int | None = None,
) -> Tensor:
    """`-sum(weights * log softmax(logits)[targets]) / denom`, without the logits; a float32 scalar (float64 in float64).

    `hidden` [..., H] predicts `targets` [...] (int64; entry i of both belongs together, so the caller shifts), `head`
    [V, H] and `bias` [V] are the output layer. Logits are `logit_scale * (hidden @ head.T + bias)`, then
    `softcap * tanh(logits / softcap)` where a soft-cap is given. Softmax and sums are in float32 (float64 for float64
    inputs), matrix multiplies in the inputs' dtype, or autocast's. Gradients reach `hidden`, `head` and `bias`, each only
    if it requires one; a head tied to the embedding adds up there as usual.

    `weights` [...] is a tensor, used under stop-gradient, or for live PEAR a callable `weights(rows, logprobs)`: it gets
    chunks of ascending indices into the flattened targets, **from the last chunk to the first**, with their float32
    log-probs, and returns their weights. Suffix sums are then known in time and cost no fourth multiply.

    Gradients are made in the forward pass and serve one backward pass; a second one (`retain_graph=True`) raises
    RuntimeError, as does a gradient of the gradient. Leaving rows out asks the device once how many remain. `backend`
    gives the work to another library (see `backends`). `chunk_rows` fixes how many rows go through the head at once; by
    default a chunk's logits take at most 192 MB, on CUDA 768 MB.

    Raises ValueError for shapes that do not fit together, an unknown backend, and a sharded head (a DTensor): call this
    inside the forward of the module that FSDP gathers.
    """
    _require_fit(hidden, head, targets, weights, bias)
    targets = targets.reshape(-1).to(hidden.device)
    if isinstance(weights, Tensor):
        weights = weights.detach().reshape(-1).to(hidden.device)
    rows = _rows_that_matter(targets, weights, ignore_index)
    layer = Layer(logit_scale, softcap, chunk_rows)
    dtype = _matmul_dtype(hidden)
    inputs = hidden.reshape(-1, hidden.shape[-1]).to(dtype), head.to(dtype), bias
    if backend == "ours":
        total: Tensor = _LinearWeightedNLL.apply(*inputs, targets, rows, weights, layer)
    else:
        from pear_data.loss.backends import weighted_total

        total = weighted_total(backend, *inputs, targets, rows, weights, layer)
    return total / (denom.to(total.device) if isinstance(denom, Tensor) else denom)


@torch.no_grad()
def linear_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> Tensor:
    """Log-probs of `targets` in their shape, float32 (float64 in float64), 0 where ignored; no gradient, no logits.

    The arguments are `linear_weighted_nll`'s.
    """
    _require_fit(hidden, head, targets, None, bias)
    dtype = _matmul_dtype(hidden)
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    wanted = targets.reshape(-1).to(hidden.device)
    rows = _rows_that_matter(wanted, None, ignore_index)
    layer = Layer(logit_scale, softcap, chunk_rows)
    out = torch.zeros(len(wanted), dtype=_statistics_dtype(dtype), device=hidden.device)
    for chunk, logits in _logits(flat, head.to(dtype), bias, rows, layer):
        out[chunk] = -negative_logprobs(logits, wanted[chunk], layer.softcap).nll
    return out.view(targets.shape)


@dataclass(frozen=True, slots=True)
class Layer:
    """What happens to the head's output, and how much of it is made at once."""

    logit_scale: float = 1.0
    softcap: float | None = None
    chunk_rows: int | None = None

    def rows_at_once(self, head: Tensor) -> int:
        if self.chunk_rows is not None:
            return self.chunk_rows
        budget = _CHUNK_BYTES.get(head.device.type, _CHUNK_BYTES["cuda"])
        return max(16, budget // (head.shape[0] * head.element_size()))


class _LinearWeightedNLL(torch.autograd.Function):
    """Sum of weight * nll over `rows`; its gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        weights: Tensor | WeightsOfRows,
        layer: Layer,
    ) -> Tensor:
        total = torch.zeros((), dtype=_statistics_dtype(hidden.dtype), device=hidden.device)
        sums = _Gradients(hidden, head, bias, ctx.needs_input_grad[:3])
        for chunk, logits in _logits(hidden, head, bias, rows, layer):
            known = negative_logprobs(logits, targets[chunk], layer.softcap)
            of_rows = weights[chunk] if isinstance(weights, Tensor) else weights(chunk, -known.nll)
            of_rows = of_rows.to(known.nll.dtype)
            total += (of_rows * known.nll).sum()
            if sums.wanted:
                gradients_in_place(logits, targets[chunk], known, of_rows, layer.logit_scale, layer.softcap)
                sums.add(chunk, logits)
        ctx.gradients = sums
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_weighted_nll makes its gradients for one backward pass: call it again for another"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.scaled(grad_output), None, None, None, None


class _Gradients:
    """Gradients summed over chunks, in float32 where the inputs have 16 bits; only those that are wanted."""

    def __init__(
        self, hidden: Tensor, head: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> None:
        self.wanted = any(needs)
        self._of, self._head = hidden, head
        sums = _statistics_dtype(head.dtype)
        self.hidden = torch.zeros_like(hidden) if needs[0] else None
        self.head = torch.zeros_like(head, dtype=sums) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=sums) if bias is not None and needs[2] else None
        self._dtypes = hidden.dtype, head.dtype, bias.dtype if bias is not None else None

    def add(self, rows: Tensor, logits: Tensor) -> None:
        """Take the gradients of a chunk's logits [n, V] in."""
        if self.hidden is not None:
            self.hidden[rows] = logits @ self._head
        if self.head is not None:
            states = self._of[rows]
            if self.head.dtype == logits.dtype:
                self.head.addmm_(logits.T, states)
            elif logits.is_cuda:
                torch.addmm(self.head, logits.T, states, out_dtype=self.head.dtype, out=self.head)
            else:
                self.head += logits.T @ states
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)

    def scaled(self, factor: Tensor) -> list[Tensor | None]:
        """The gradients times `factor`, in place, in the dtypes of what they belong to."""
        sums = self.hidden, self.head, self.bias
        return [
            None if one is None else one.mul_(factor.to(one.dtype)).to(dtype)
            for one, dtype in zip(sums, self._dtypes, strict=True)
        ]


def _logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, rows: Tensor, layer: Layer
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, their scaled logits) from the last chunk to the first; the logits' memory is used again by the next."""
    at_once = layer.rows_at_once(head)
    buffer = hidden.new_empty(min(at_once, len(rows)), head.shape[0])
    starts = range(0, len(rows), at_once)
    for start in reversed(starts):
        chunk = rows[start : start + at_once]
        logits = torch.mm(hidden[chunk], head.T, out=buffer[: len(chunk)])
        if bias is not None:
            logits += bias
        if layer.logit_scale != 1.0:
            logits *= layer.logit_scale
        yield chunk, logits


def _rows_that_matter(targets: Tensor, weights: Tensor | WeightsOfRows | None, ignore_index: int) -> Tensor:
    matters = targets != ignore_index
    if isinstance(weights, Tensor):
        matters &= weights != 0
    return matters.nonzero()[:, 0]


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _require_fit(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor | WeightsOfRows | None,
    bias: Tensor | None,
) -> None:
    if type(head).__name__ == "DTensor":
        raise ValueError(
            "the head is sharded (a DTensor): compute the loss inside the forward of the module that FSDP gathers, "
            "as attach(model, fused=True) does"
        )
    shapes = f"hidden {list(hidden.shape)}, head {list(head.shape)}, targets {list(targets.shape)}"
    if head.dim() != 2 or hidden.shape[-1] != head.shape[1] or hidden.shape[:-1] != targets.shape:
        raise ValueError(f"{shapes} must be [..., H], [V, H] and [...]")
    if isinstance(weights, Tensor) and weights.shape != targets.shape:
        raise ValueError(
            f"weights {list(weights.shape)} and targets {list(targets.shape)} must have one shape"
        )
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"{shapes}: the bias {list(bias.shape)} must be [V]")
