"""Output head and weighted loss in one: hidden states in, loss and gradients out, the logits never whole.

Rows go through the head in chunks. A chunk's logits turn into their own gradients in one buffer, so that three matrix
multiplies (logits, gradient of the hidden states, gradient of the head) and that buffer are all it costs. Rows that
cannot matter, because they are ignored or weigh nothing, are left out before the first multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pear_data.loss.chunks import split_rows
from pear_data.loss.epilogue import (
    Head,
    WeightsOfNll,
    gradients_in_place,
    negative_logprobs,
    statistics_dtype,
)
from pear_data.loss.fused_gradients import GradientSums

WeightsOfRows = Callable[[Tensor, Tensor], Tensor]


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
    """`-sum(weights * log softmax(logits)[targets]) / denom`, without the logits: a scalar in float32.

    `hidden` [..., H] predicts `targets` [...] (int64; entry i of both belongs together, so the caller shifts); `head`
    [V, H] and `bias` [V] are the output layer. Logits are `logit_scale * (hidden @ head.T + bias)`, then
    `softcap * tanh(logits / softcap)` where a soft-cap is given. Softmax and sums are in float32 (all is float64 for
    float64 inputs), matrix multiplies in the inputs' dtype, or autocast's. Gradients reach `hidden`, `head` and `bias`,
    each only if it requires one; a head tied to the embedding adds up there as usual. Without gradients one multiply
    remains.

    `weights` [...] is a tensor, used under stop-gradient, or for live PEAR a callable `weights(rows, logprobs)`: it
    gets chunks of ascending indices into the flattened targets, **from the last chunk to the first**, with their
    float32 log-probs, and returns their weights. Suffix sums are then known in time and cost no fourth multiply. Then
    only ignored rows are left out. A callable may have a method `begins_of_sequences()` that returns None or a tensor
    (int64, ascending, ranks among the rows that are not ignored): chunks are then parted there alone, and weights asked
    for once a chunk, so that sums over whole sequences are known in time too. In 16 bits the log-probs then take one
    more pass over a chunk's logits; on CUDA parting is one more wait for the device. Memory grows with the longest
    sequence.

    Gradients are made in the forward pass and serve one backward pass; a second one (`retain_graph=True`) raises
    RuntimeError, and so does `create_graph=True`. Leaving rows out asks the device once how many remain: the one wait
    of host for device, which saves a third of the work where a third is masked. `backend` gives the work to another
    library (see `backends`). `chunk_rows` fixes how many rows go through the head at once; by default 512, in 16 bits
    and on CUDA more, as long as their logits fit in 768 MiB; a chunk of whole sequences takes these until it has as
    many rows, within the same bound. Over several chunks a head of 16 bits has its gradient summed in float32, which
    until the backward pass takes twice the memory of the gradient, and on a CPU, which rounds its products, a fourth
    multiply.

    Raises ValueError for shapes, dtypes and devices that do not fit together, an unknown backend, and a sharded head (a
    DTensor): call this inside the forward of the module that FSDP gathers. A target outside the vocabulary raises
    torch's own RuntimeError on a CPU, and makes the loss and its gradients NaN in the CUDA kernel.
    """
    _require_fit(hidden, head, targets, weights, bias)
    if isinstance(weights, Tensor):
        weights = weights.detach().reshape(-1).to(hidden.device)
    targets = targets.reshape(-1).to(hidden.device)
    rows = _rows_that_matter(targets, weights, ignore_index)
    states = hidden.reshape(-1, hidden.shape[-1])
    layer = Head(head, bias, logit_scale, softcap)
    if isinstance(denom, Tensor):
        denom = denom.to(hidden.device)
    if backend == "ours":
        loss: Callable[..., Tensor] = _LinearWeightedNLL.apply
        return loss(
            states, head, bias, layer, targets, rows, weights, denom, chunk_rows, torch.is_grad_enabled()
        )
    from pear_data.loss.backends import weighted_total

    return weighted_total(backend, states, layer, targets, rows, weights) / denom


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

    The arguments, and the errors raised, are `linear_weighted_nll`'s.
    """
    _require_fit(hidden, head, targets, None, bias)
    wanted = targets.reshape(-1).to(hidden.device)
    rows = _rows_that_matter(wanted, None, ignore_index)
    layer = _for_multiplies(Head(head, bias, logit_scale, softcap), hidden)
    out = torch.zeros(len(wanted), dtype=statistics_dtype(layer.weight.dtype), device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        chunks = split_rows(layer.weight, rows, chunk_rows, None)
        for chunk, _, outputs in _outputs(hidden.reshape(-1, hidden.shape[-1]), layer.weight, chunks):
            out[chunk] = -negative_logprobs(outputs, wanted[chunk], layer)
    return out.view(targets.shape)


class _LinearWeightedNLL(torch.autograd.Function):
    """Sum of weight * nll over `rows`, by `denom`; its gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        layer: Head,
        targets: Tensor,
        rows: Tensor,
        weights: Tensor | WeightsOfRows,
        denom: Tensor | float,
        chunk_rows: int | None,
        grad_enabled: bool,
    ) -> Tensor:
        # `needs_input_grad` is true under no_grad as well.
        wanted = [needed and grad_enabled for needed in ctx.needs_input_grad[:3]]
        layer = _for_multiplies(layer, hidden)
        begins = _begins_of_sequences(weights)
        chunks = split_rows(layer.weight, rows, chunk_rows, begins)
        total = torch.zeros((), dtype=statistics_dtype(layer.weight.dtype), device=hidden.device)
        sums = GradientSums(hidden, layer.weight, bias, wanted, len(chunks)) if any(wanted) else None
        # float16 would lose what a large denominator makes small, and a scaled loss comes with the backward pass.
        before = 1.0 if layer.weight.dtype == torch.float16 else denom
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk, states, outputs in _outputs(hidden, layer.weight, chunks):
                weigh = _weights_of_chunk(weights, chunk, before, total.dtype)
                if sums is not None:
                    known = gradients_in_place(outputs, targets[chunk], layer, weigh, begins is not None)
                    nll, of_rows = known.nll, known.weights
                    sums.add(chunk, states, outputs, known.factor)
                else:
                    nll = negative_logprobs(outputs, targets[chunk], layer)
                    of_rows = weigh if isinstance(weigh, Tensor) else weigh(slice(0, len(chunk)), nll)
                total += (of_rows * nll).sum()
        after = denom if layer.weight.dtype == torch.float16 else 1.0
        ctx.gradients, ctx.after = sums, after
        ctx.dtypes = [hidden.dtype, head.dtype, None if bias is None else bias.dtype]
        return total / after

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_weighted_nll has no gradients of gradients: leave create_graph=False")
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_weighted_nll makes its gradients for one backward pass: call it again for another"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.scaled(grad_output / ctx.after, ctx.dtypes), *[None] * 7


def _begins_of_sequences(weights: Tensor | WeightsOfRows) -> Tensor | None:
    begins = getattr(weights, "begins_of_sequences", None)
    return begins() if begins is not None else None


def _weights_of_chunk(
    weights: Tensor | WeightsOfRows, chunk: Tensor, before: Tensor | float, dtype: torch.dtype
) -> Tensor | WeightsOfNll:
    """By `before`, in `dtype`."""
    if isinstance(weights, Tensor):
        return weights[chunk].to(dtype) / before

    def of_nll(rows: slice, nll: Tensor) -> Tensor:
        of_rows: Tensor = weights(chunk[rows], -nll).to(dtype) / before
        return of_rows

    return of_nll


def _outputs(
    hidden: Tensor, weight: Tensor, chunks: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows, their hidden states, hidden @ weight.T) from the last chunk to the first, one memory for all products."""
    buffer = weight.new_empty(max(map(len, chunks), default=0), len(weight))
    for chunk in reversed(chunks):
        states = hidden[chunk].to(weight.dtype)
        yield chunk, states, torch.mm(states, weight.T, out=buffer[: len(chunk)])


def _rows_that_matter(targets: Tensor, weights: Tensor | WeightsOfRows | None, ignore_index: int) -> Tensor:
    matters = targets != ignore_index
    if isinstance(weights, Tensor):
        matters &= weights != 0
    return matters.nonzero()[:, 0]


def _for_multiplies(head: Head, hidden: Tensor) -> Head:
    """In autocast's dtype, where that is on."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return head
    return replace(head, weight=head.weight.to(torch.get_autocast_dtype(kind)))


def _require_fit(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor | WeightsOfRows | None,
    bias: Tensor | None,
) -> None:
    named = {"hidden": hidden, "head": head, "targets": targets, "bias": bias}
    found = ", ".join(f"{name} {list(one.shape)}" for name, one in named.items() if one is not None)
    for name, one in named.items():
        if type(one).__name__ == "DTensor":
            raise ValueError(
                f"{name} is sharded (a DTensor): compute the loss inside the forward of the module that FSDP gathers, "
                "as attach(model, fused=True) does"
            )
    if head.dim() != 2 or hidden.shape[-1:] != head.shape[1:] or hidden.shape[:-1] != targets.shape:
        raise ValueError(f"{found}: the first three must be [..., H], [V, H] and [...]")
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"{found}: the bias must be [V]")
    if isinstance(weights, Tensor) and weights.shape != targets.shape:
        raise ValueError(
            f"weights {list(weights.shape)} and targets {list(targets.shape)} must have one shape"
        )
    dtypes = {one.dtype for one in (hidden, head, bias) if one is not None}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"hidden, head and bias are of several dtypes ({', '.join(sorted(map(str, dtypes)))}): cast them, "
            "or use autocast"
        )
    if hidden.device != head.device:
        raise ValueError(
            f"hidden is on {hidden.device}, head on {head.device}: move the hidden states to the head"
        )
