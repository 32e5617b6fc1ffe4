"""The Triton epilogue against torch's on the CPU: there too, in a process with TRITON_INTERPRET=1, or on CUDA.

As a program it prints "equal".
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from pear_data.loss import epilogue, epilogue_triton
from pear_data.loss.epilogue import Head

HEADS = [(False, 1.0, None), (True, 0.3, None), (False, 1.0, 2.0), (True, 1.7, 5.0)]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def compare(
    dtype: torch.dtype,
    vocabulary: int,
    bias: bool,
    logit_scale: float,
    softcap: float | None,
    device: str = "cpu",
) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    outputs = (4 * torch.randn(6, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(0, vocabulary, (6,), generator=generator)
    targets[0], targets[1] = 0, vocabulary - 1
    weights = torch.tensor([1.0, 2.0, -1.0, 0.5, 0.0, 148.0])
    inner = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    head = Head(torch.empty(0), inner, logit_scale, softcap)

    # Real exponentials are approximate, and sums fused.
    tolerance = TOLERANCE[dtype] * (1 if device == "cpu" else 4)
    by_torch, by_triton = outputs.clone(), outputs.to(device, copy=True)
    there = [targets.to(device), replace(head, bias=None if inner is None else inner.to(device))]
    known = epilogue.gradients_in_place(by_torch, targets, head, weights)
    nll = epilogue_triton.gradients_in_place(by_triton, *there, weights.to(device)).cpu()
    right = by_torch.double() if known.factor is None else by_torch * known.factor[:, None].double()
    scale = (weights * logit_scale).abs().clamp(min=1.0)[:, None]
    torch.testing.assert_close(by_triton.cpu().double() / scale, right / scale, rtol=0, atol=tolerance)
    torch.testing.assert_close(nll, known.nll, rtol=0, atol=2e-5)

    untouched = outputs.to(device, copy=True)
    alone = epilogue_triton.negative_logprobs(untouched, *there).cpu()
    torch.testing.assert_close(alone, nll, rtol=0, atol=2e-5)
    torch.testing.assert_close(epilogue.negative_logprobs(outputs, targets, head), nll, rtol=0, atol=2e-5)
    assert torch.equal(untouched.cpu(), outputs)


def show_faults(device: str = "cpu") -> None:
    """A row whose target is no token is NaN, and no other."""
    outputs = torch.zeros(3, 7, device=device)
    targets, weights = torch.tensor([-1, 3, 7], device=device), torch.ones(3, device=device)
    nll = epilogue_triton.gradients_in_place(outputs, targets, Head(torch.empty(0)), weights)
    assert nll.isnan().tolist() == outputs.isnan().all(1).tolist() == [True, False, True]
    assert torch.isfinite(outputs[1]).all()


if __name__ == "__main__":
    show_faults()
    # Less than a block, a whole one, and one entry more.
    for dtype, vocabulary, head in itertools.product(TOLERANCE, (5, 8192, 8193), HEADS):
        compare(dtype, vocabulary, *head)
    print("equal")
