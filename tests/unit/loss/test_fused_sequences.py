"""Live weights that rest on whole sequences, in the fused loss: against autograd on whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pear_data.loss import LivePear, LiveWeightsOfRows, epilogue, linear_weighted_nll

VOCAB, WIDTH, DENOM = 131, 12, 7.0
LIVE: list[dict[str, Any]] = [
    {"level": "sequence"},
    {"level": "sequence", "negative_scale": 0.5},
    {"level": "block", "negative_scale": 0.5},
    {"level": "token", "negative_scale": 2.0},
]
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)]


def columns(packed: bool) -> dict[str, Tensor]:
    """Sequences of 60 tokens, of 1, of none that is scored, and of a few; every third negative."""
    lengths = [60, 1, 9, 1, 5, 7, 3, 1, 12, 20]
    generator = torch.Generator().manual_seed(2)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scored = (torch.rand(len(ids), generator=generator) < 0.8) & (ids != 2)
    scored |= (ids == 1) | (ids == 7)
    if packed:
        shape = (1, -1)
    else:  # rows of two packs, padded
        ids, scored = (F.pad(one, (0, 1)) for one in (ids, scored))
        shape = (2, -1)
    targets = torch.randint(0, VOCAB, ids.shape, generator=generator).masked_fill(~scored, -100)
    behavior = torch.randn(ids.shape, generator=generator, dtype=torch.float64) * 0.2 - 4.9
    found = {"targets": targets, "behavior": behavior, "ids": ids, "negative": ids % 3 == 1}
    return {name: one.view(shape) for name, one in found.items()}


def hidden_and_head(batch: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = 0.1 * torch.randn(*batch["ids"].shape, WIDTH, generator=generator)
    head = torch.randn(VOCAB, WIDTH, generator=generator)
    return [one.to(dtype).requires_grad_() for one in (hidden, head)]


class WatchedWeights:
    """Keeps what was found."""

    def __init__(self, weights: LiveWeightsOfRows, tokens: int) -> None:
        self.begins_of_sequences = weights.begins_of_sequences
        self.found = torch.zeros(tokens)
        self._weights = weights

    def __call__(self, rows: Tensor, logprobs: Tensor) -> Tensor:
        self.found[rows] = self._weights(rows, logprobs)
        return self.found[rows]


class Multiplies(TorchDispatchMode):
    """How often every scored row went through a matrix product with the head or its gradient."""

    def __init__(self, scored: int) -> None:
        super().__init__()
        self.times = 0.0
        self._scored = scored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = [one for one in args if isinstance(one, Tensor)][-2:]
            self.times += left.shape[0] * left.shape[1] * right.shape[1] / (VOCAB * WIDTH * self._scored)
        return func(*args, **(kwargs or {}))


def whole(batch: dict[str, Tensor], hidden: Tensor, head: Tensor, live: LivePear) -> tuple[Tensor, Tensor]:
    """Loss by autograd on the logits, and the weights."""
    scored = batch["targets"] != -100
    chosen = batch["targets"].masked_fill(~scored, 0)[..., None]
    logprobs = (hidden @ head.T).log_softmax(-1).gather(-1, chosen)[..., 0]
    negative = batch["negative"] if live.negative_scale else None
    weights = live.weights(logprobs, batch["behavior"], scored, batch["ids"], negative)
    return -(weights.double() * logprobs).sum() / DENOM, weights


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", LIVE, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("chunk_rows", [None, 8])
def test_loss_weights_and_gradients_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
    options: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    chunk_rows: int | None,
) -> None:
    """Several chunks of several blocks, the first a sequence longer than others' chunks."""
    monkeypatch.setattr(epilogue, "_CACHE_BYTES_A_THREAD", 3 * 4 * VOCAB)
    live, batch = LivePear(**options), columns(packed)
    negative = batch["negative"] if live.negative_scale else None
    of_rows = LiveWeightsOfRows(live, batch["behavior"], batch["targets"] != -100, batch["ids"], negative)
    inputs = hidden_and_head(batch, dtype)
    exact = [one.detach().double().requires_grad_() for one in inputs]
    value, weights = whole(batch, *exact, live)
    with Multiplies(int((batch["targets"] != -100).sum())) as multiplied:
        watched = WatchedWeights(of_rows, weights.numel())
        loss = linear_weighted_nll(*inputs, batch["targets"], watched, denom=DENOM, chunk_rows=chunk_rows)
    sixteen_bits = dtype == torch.bfloat16
    # Of a head of 16 bits over several chunks what sums round off is multiplied as well.
    assert multiplied.times == pytest.approx(4 if sixteen_bits and chunk_rows else 3)
    assert loss.item() == pytest.approx(value.item(), rel=tolerance)
    torch.testing.assert_close(watched.found.view_as(weights), weights, rtol=max(tolerance, 1e-6), atol=0)
    right = torch.autograd.grad(value, exact)
    for gradient, expected in zip(torch.autograd.grad(loss, inputs), right, strict=True):
        assert float((gradient - expected).abs().max() / expected.abs().max()) <= tolerance
    with torch.no_grad():
        again = linear_weighted_nll(*inputs, batch["targets"], of_rows, denom=DENOM, chunk_rows=chunk_rows)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
