"""An output head that, while a loss is on its way, hands on its inputs in place of logits.

The model's forward then does to them what it does to logits: it divides by a scale, or caps them. What it did is
remembered, and the loss knows the whole head without ever having asked which architecture it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Number = float  # within the class below, `float` is a method of logits
InsideHead = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class DeferredLogits:
    """Logits that were not computed: `times / by * (hidden @ weight.T + bias)`, then `cap * tanh(that)` if capped.

    Takes the place of the tensor between the head and the loss. Anything but a change of scale or dtype and one tanh
    raises TypeError or AttributeError.
    """

    head: nn.Module
    hidden: Tensor
    times: Number = 1.0
    by: Number = 1.0
    cap: Number | None = None

    @property
    def logit_scale(self) -> Number:
        # In this order a soft-cap's division and multiplication cancel exactly.
        return self.times * (1.0 if self.cap is None else self.cap) / self.by

    @property
    def shape(self) -> torch.Size:
        vocabulary: int = self.head.out_features  # type: ignore[assignment]
        return torch.Size([*self.hidden.shape[:-1], vocabulary])

    def inside(self, compute: InsideHead) -> Tensor:
        """`compute(hidden, weight, bias)` within the head's own forward, where FSDP has its parameters whole."""
        result: Tensor = self.head(self.hidden, inside=compute)
        return result

    def __mul__(self, factor: Number) -> DeferredLogits:
        _require_number(factor)
        if self.cap is None:
            return replace(self, times=self.times * factor)
        return replace(self, cap=self.cap * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Number) -> DeferredLogits:
        _require_number(divisor)
        if self.cap is None:
            return replace(self, by=self.by * divisor)
        return replace(self, cap=self.cap / divisor)

    def tanh(self) -> DeferredLogits:
        if self.cap is not None:
            raise TypeError("a second tanh of the logits")
        return replace(self, cap=1.0)

    def contiguous(self) -> DeferredLogits:
        return self

    def float(self) -> DeferredLogits:
        return self

    def to(self, target: torch.dtype | torch.device) -> DeferredLogits:
        if isinstance(target, torch.dtype) and not target.is_floating_point:
            raise TypeError(f"logits in {target}")
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        raise TypeError(f"{getattr(func, '__name__', func)} of the logits")


class DeferredHead:
    """The `forward` of an `nn.Linear`: as ever, or deferred, or a computation with its parameters at hand."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.forward = head.__dict__.get("forward")
        self.deferring = False

    def __call__(self, hidden: Tensor, *, inside: InsideHead | None = None) -> Tensor | DeferredLogits:
        if inside is not None:
            return inside(hidden.to(self.head.weight.device), self.head.weight, self.head.bias)
        if self.deferring:
            return DeferredLogits(self.head, hidden)
        if self.forward is not None:
            logits: Tensor = self.forward(hidden)
            return logits
        return nn.Linear.forward(self.head, hidden)


def _require_number(value: object) -> None:
    if not isinstance(value, float | int):
        raise TypeError(f"logits scaled by a {type(value).__name__}, which is no constant")
