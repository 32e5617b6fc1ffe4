"""A backend's gradients against float64, on a tiny problem that has what went wrong in released versions.

Weights differ from row to row and have both signs (a release gave all rows the first one's weight), and half of the
vocabulary is improbable in every row (a filter drops small gradients before they are weighted).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pear_data.loss.backends import Backend
from pear_data.loss.epilogue import Head

_ROWS, _VOCABULARY, _WIDTH = 24, 600, 64
# Of the largest gradient in the same row of the matrix. What goes wrong is wrong by a half or more.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


def require_right_gradients(backend: Backend, hidden: Tensor, head: Head) -> None:
    """Once in a process for each device, dtype and kind of head.

    Raises RuntimeError where the backend fails, or its gradients are wrong by more than its dtype explains.
    """
    bias = head.bias is not None
    _prove(backend, hidden.device, hidden.dtype, bias, head.logit_scale, head.softcap)


@cache
def _prove(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    bias: bool,
    logit_scale: float,
    softcap: float | None,
) -> None:
    hidden, head, targets, weights = _problem(bias, logit_scale, softcap)
    where = f"{backend.described()} on {device} in {str(dtype).removeprefix('torch.')}"
    with torch.inference_mode(False), torch.enable_grad():
        try:
            of_backend = [part.to(device, dtype).requires_grad_() for part in (hidden, head.weight)]
            inner = None if head.bias is None else head.bias.to(device, dtype)
            used = Head(of_backend[1], inner, logit_scale, softcap)
            nll = backend.nll(of_backend[0], used, targets.to(device))
            gradients = torch.autograd.grad((nll * weights.to(nll)).sum(), of_backend)
        except Exception as error:
            raise RuntimeError(
                f"{where} fails its self-check ({type(error).__name__}: {error}): use backend='ours'"
            ) from error
        # From the same rounded numbers.
        exact = [part.detach().cpu().double().requires_grad_() for part in of_backend]
        inner = None if inner is None else inner.cpu().double()
        logits = (F.linear(exact[0], exact[1], inner)) * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        expected = torch.autograd.grad(
            (F.cross_entropy(logits, targets, reduction="none") * weights).sum(), exact
        )
    wrong = max(
        _row_error(found.cpu().double(), right) for found, right in zip(gradients, expected, strict=True)
    )
    if not wrong <= _TOLERANCE[dtype]:
        raise RuntimeError(
            f"{where} fails its self-check: with a weight per token its gradients are off by {wrong:.1g} of their "
            "size; use another version, or backend='ours'"
        )


def _problem(bias: bool, logit_scale: float, softcap: float | None) -> tuple[Tensor, Head, Tensor, Tensor]:
    """float64 on the CPU; leaves torch's random numbers alone."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_ROWS, _WIDTH, dtype=torch.float64, generator=generator)
    head = torch.randn(_VOCABULARY, _WIDTH, dtype=torch.float64, generator=generator) / _WIDTH**0.5
    hidden[:, 0] = 4.0
    head[:, 0] = 0.0
    head[_VOCABULARY // 2 :, 0] = -1.5
    hidden /= max(logit_scale, 1.0)
    targets = torch.randint(0, _VOCABULARY // 2, (_ROWS,), generator=generator)
    weights = torch.tensor([0.25, 4.0, -1.0, 1.0, 16.0, 0.5], dtype=torch.float64).repeat(_ROWS // 6)
    inner = torch.randn(_VOCABULARY, dtype=torch.float64, generator=generator) / 4 if bias else None
    return hidden, Head(head, inner, logit_scale, softcap), targets, weights


def _row_error(found: Tensor, right: Tensor) -> float:
    return float(((found - right).abs().amax(1) / right.abs().amax(1)).max())
