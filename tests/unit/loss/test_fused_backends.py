"""Other libraries' heads give our gradients or are refused by name.

Liger needs CUDA, or Triton's interpreter, in which its real kernels run here, in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pear_data.loss import backends, backends_proof
from pear_data.loss.fused import linear_weighted_nll

HIDDEN, HEAD, BIAS = (3, 17, 64), (301, 64), (301,)


@pytest.fixture(autouse=True)
def _nothing_proven() -> Iterator[None]:
    backends_proof._prove.cache_clear()
    yield
    backends_proof._prove.cache_clear()


def inputs(dtype: torch.dtype, bias: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [HIDDEN, HEAD, *([BIAS] if bias else [])]
    return [(torch.randn(shape, generator=generator) / 2).to(dtype).requires_grad_() for shape in shapes]


def loss(tensors: list[Tensor], backend: str, **settings: Any) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    targets = torch.randint(0, HEAD[0], HIDDEN[:-1], generator=generator)
    weights = torch.randn(HIDDEN[:-1], generator=generator)
    targets[0, :3], weights[1, 4:7] = -100, 0.0
    settings = {"weights": weights, "denom": 3.0, **settings}
    bias = tensors[2] if len(tensors) == 3 else None
    return linear_weighted_nll(tensors[0], tensors[1], targets, bias=bias, backend=backend, **settings)


def difference(backend: str, dtype: torch.dtype, bias: bool = False, **settings: Any) -> float:
    tensors = inputs(dtype, bias)
    theirs, ours = loss(tensors, backend, **settings), loss(tensors, "ours", **settings)
    pairs = [(theirs, ours)]
    pairs += zip(torch.autograd.grad(theirs, tensors), torch.autograd.grad(ours, tensors), strict=True)
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
def test_torchs_head_gives_our_gradients(
    dtype: torch.dtype, tolerance: float, bias: bool, logit_scale: float
) -> None:
    assert difference("torch", dtype, bias, logit_scale=logit_scale) <= tolerance


def test_live_weights_are_asked_for_once() -> None:
    calls: list[Tensor] = []

    def of_rows(rows: Tensor, logprobs: Tensor) -> Tensor:
        assert not logprobs.requires_grad
        calls.append(rows)
        return logprobs.exp()

    tensors = inputs(torch.float64, False)
    theirs = loss(tensors, "torch", weights=of_rows)
    assert len(calls) == 1
    assert len(calls[0]) == 3 * 17 - 3
    ours = loss(tensors, "ours", weights=of_rows)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-12)


def test_under_autocast_it_multiplies_in_autocasts_dtype() -> None:
    tensors = inputs(torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = loss(tensors, "torch"), loss(tensors, "ours")
    for a, b in zip(torch.autograd.grad(theirs, tensors), torch.autograd.grad(ours, tensors), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()


def test_a_batch_in_which_nothing_counts_has_gradients_of_zero() -> None:
    tensors = inputs(torch.float32, True)
    nothing = loss(tensors, "torch", weights=torch.zeros(HIDDEN[:-1]))
    nothing.backward()
    assert nothing.item() == 0.0
    assert all(one.grad is not None and not one.grad.any() for one in tensors)


@pytest.mark.parametrize(
    ("name", "settings", "bias", "message"),
    [
        ("liger", {}, False, r"'liger' \(liger-kernel 0\.8\.\d+\) needs CUDA"),
        ("cce", {}, False, r"'cce' \(cut-cross-entropy 25\.\d+\.\d+\) needs CUDA"),
        ("torch", {"softcap": 5.0}, False, "takes no soft-cap: use backend='ours'"),
    ],
)
def test_what_a_backend_cannot_do_is_said(
    name: str, settings: dict[str, Any], bias: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(inputs(torch.float32, bias), name, **settings)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", None)
    with pytest.raises(ValueError, match=r"cannot be imported .*: pip install 'liger-kernel>=0\.8\.2'"):
        loss(inputs(torch.float32, False), "liger")


def first_weight_for_all(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
) -> Tensor:
    """What Liger did before 0.8.2: right losses, and every row's gradient times the first row's weight."""
    nll = backends._torch(hidden, weight, bias, targets, softcap)
    alike = nll[:1] + (nll - nll[:1]).detach()
    return alike + (nll.sum() - nll.sum().detach()) - (nll[:1] - nll[:1].detach())


def filtered(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
) -> Tensor:
    """What CCE does by default: gradients below a threshold are dropped before they are weighted."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits.register_hook(lambda gradient: gradient.masked_fill(gradient.abs() < 1e-4, 0.0))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def broken(*_arguments: object) -> Tensor:
    raise TypeError("no such kernel")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (first_weight_for_all, "with a weight per token its gradients are off by .* use another version"),
        (filtered, "with a weight per token its gradients are off by .* use another version"),
        (broken, r"fails its self-check \(TypeError: no such kernel\): use backend='ours'"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wrong_gradients_are_found_before_they_are_used(
    monkeypatch: pytest.MonkeyPatch, wrong: Any, message: str, dtype: torch.dtype
) -> None:
    faulty = replace(backends.BACKENDS["torch"], nll_of_rows=wrong)
    monkeypatch.setitem(backends.BACKENDS, "torch", faulty)
    with pytest.raises(RuntimeError, match=rf"'torch' \(torch 2\.\S+\) on cpu in .*{message}"):
        loss(inputs(dtype, False), "torch")


def test_a_backend_is_proven_once_for_each_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.BACKENDS["torch"]
    calls: list[int] = []

    def counted(hidden: Tensor, *rest: Any) -> Tensor:
        calls.append(len(hidden))
        return backend.nll_of_rows(hidden, *rest)

    monkeypatch.setitem(backends.BACKENDS, "torch", replace(backend, nll_of_rows=counted))
    numbers = torch.random.get_rng_state()
    for dtype in (torch.float32, torch.float32, torch.float64, torch.float32):
        with torch.no_grad():
            loss(inputs(dtype, False), "torch")
    assert calls.count(backends_proof._ROWS) == 2
    assert len(calls) == 6
    assert torch.equal(numbers, torch.random.get_rng_state())


IN_TRITONS_INTERPRETER = """
import torch
from test_fused_backends import difference
assert difference("liger", torch.float32) <= 5e-6
assert difference("liger", torch.bfloat16, bias=True, logit_scale=0.25) <= 2e-2
try:
    difference("cce", torch.float32, bias=True)
except ValueError as error:
    assert "takes no bias" in str(error), error
print("equal")
"""


def test_ligers_kernels_give_our_gradients() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_TRITONS_INTERPRETER],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.path.dirname(__file__),
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal\n", done.stderr
