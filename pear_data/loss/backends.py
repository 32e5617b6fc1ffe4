"""Other libraries' fused heads, for those who trust or prefer one: asked for by name, never chosen by themselves.

    liger   LigerFusedLinearCrossEntropyFunction, reduction "none" (liger-kernel >= 0.8.2), CUDA
    cce     cut_cross_entropy.linear_cross_entropy, reduction "none", its gradient filter off, CUDA; no bias
    torch   torch.nn.functional.linear_cross_entropy, reduction "none" (torch >= 2.13), in chunks; no soft-cap

All three make the logits twice: they learn a row's weight in the backward pass only, so they multiply four times where
`ours` multiplies three times. Releases of each have had gradients that were silently wrong for weights per row, so a
backend proves itself (`backends_proof`) before its first use in a process and configuration.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pear_data.loss.epilogue import Head, statistics_dtype

WeightsOfRows = Callable[[Tensor, Tensor], Tensor]


def weighted_total(
    name: str,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: Tensor,
    weights: Tensor | WeightsOfRows,
) -> Tensor:
    """Sum of weight * nll over `rows` of `hidden` [N, H] and `targets` [N], by the backend `name`; a float32 scalar.

    Live weights are asked for once, for all rows. Raises ValueError for an unknown backend and for what it cannot do
    (head, device, version), RuntimeError where its gradients are wrong here.
    """
    backend = BACKENDS.get(name)
    if backend is None:
        raise ValueError(f"backend {name!r} is unknown: ours, {', '.join(sorted(BACKENDS))}")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, head = hidden.to(dtype), replace(head, weight=head.weight.to(dtype))
    backend.require_support(hidden, head)
    if not len(rows):
        parts = [hidden, head.weight] if head.bias is None else [hidden, head.weight, head.bias]
        return torch.stack([part[:0].sum().to(statistics_dtype(hidden.dtype)) for part in parts]).sum()
    from pear_data.loss.backends_proof import require_right_gradients

    with torch.autocast(kind, enabled=False):
        require_right_gradients(backend, hidden, head)
        nll = backend.nll(hidden[rows], head, targets[rows])
        of_rows = weights[rows] if isinstance(weights, Tensor) else weights(rows, -nll.detach())
        return (of_rows.to(nll.dtype) * nll).sum()


@dataclass(frozen=True, slots=True)
class Backend:
    """`nll_of_rows(hidden [n, H], weight [V, H], bias [V], targets [n], softcap)` gives [n], and is differentiable."""

    name: str
    module: str
    requirement: str
    nll_of_rows: Callable[[Tensor, Tensor, Tensor | None, Tensor, float | None], Tensor]
    needs_cuda: bool = True
    has_bias: bool = True
    has_softcap: bool = True

    def nll(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        """[n] in float32, float64 for float64 inputs. The logit scale is taken to hidden states and bias."""
        scale, bias = head.logit_scale, head.bias
        if scale != 1.0:
            hidden, bias = hidden * scale, None if bias is None else bias * scale
        nll = self.nll_of_rows(hidden, head.weight, bias, targets, head.softcap)
        return nll.to(statistics_dtype(hidden.dtype))

    def described(self) -> str:
        distribution = self.requirement.split(">=")[0]
        return f"backend {self.name!r} ({distribution} {metadata.version(distribution)})"

    def require_support(self, hidden: Tensor, head: Head) -> None:
        """Raises ValueError for what is known not to work."""
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            raise ValueError(
                f"backend {self.name!r} cannot be imported ({error}): pip install '{self.requirement}', or use "
                "backend='ours'"
            ) from error
        lack = None
        if self.needs_cuda and hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            lack = "needs CUDA, and the hidden states are on the CPU"
        elif head.bias is not None and not self.has_bias:
            lack = "takes no bias"
        elif head.softcap is not None and not self.has_softcap:
            lack = "takes no soft-cap"
        if lack:
            raise ValueError(f"{self.described()} {lack}: use backend='ours'")


def _liger(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    settings: dict[str, Any] = {
        "ce_weight": None,
        "ignore_index": -100,
        "lse_square_scale": 0.0,
        "label_smoothing": 0.0,
        "reduction": "none",
        "softcap": softcap,
        "return_z_loss": False,
        "accum_dtype": torch.float32,
    }
    results = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, bias, *settings.values())
    nll: Tensor = results[0]
    return nll


def _cce(
    hidden: Tensor, weight: Tensor, _bias: Tensor | None, targets: Tensor, softcap: float | None
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # The filter drops small gradients before they are weighted.
    nll: Tensor = linear_cross_entropy(
        hidden, weight, targets, softcap=softcap, reduction="none", filter_eps=None
    )
    return nll


def _torch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, _softcap: float | None
) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        hidden, weight, targets, linear_bias=bias, reduction="none", options=options
    )


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("liger", "liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel>=0.8.2", _liger),
        Backend("cce", "cut_cross_entropy", "cut-cross-entropy>=25.1", _cce, has_bias=False),
        Backend(
            "torch",
            "torch.nn.modules.linear_cross_entropy",
            "torch>=2.13",
            _torch,
            needs_cuda=False,
            has_softcap=False,
        ),
    )
}
