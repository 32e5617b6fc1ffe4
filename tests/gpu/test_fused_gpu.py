"""The fused loss on CUDA: its kernel, every backend, gradients against float64, memory, and how often it waits.

The methods are those of tests/benchmarks/loss.py; `python tests/benchmarks/loss.py --device cuda` prints their figures.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import epilogues_compared
import pytest
import torch
from loss_methods import Problem, Shape, exact_gradients, step_of
from loss_process import error_of, peak_of
from tiny_models import save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from pear_data.loss import LivePear, LiveWeightsOfRows, attach, linear_logprobs, linear_weighted_nll

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SMALL = Shape(rows=1200, vocabulary=8195, width=256)
LARGE = Shape(rows=8192, vocabulary=151_936, width=4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [5, 8192, 8193, 151_936])
def test_the_kernel_does_what_torch_does_on_a_cpu(dtype: torch.dtype, vocabulary: int) -> None:
    for head in epilogues_compared.HEADS:
        epilogues_compared.compare(dtype, vocabulary, *head, device=DEVICE)


def test_a_target_that_is_no_token_is_nan() -> None:
    epilogues_compared.show_faults(DEVICE)


def errors(problem: Problem, right: dict[str, Tensor], name: str) -> list[float]:
    """Of the gradients by hidden states and head: root mean squares, by those of float64's."""
    found = [problem.hidden.grad, problem.head.grad]
    assert all(one is not None for one in found)
    each = [error_of(one, exact).rms for one, exact in zip(found, right.values(), strict=True)]
    print(f"{name}, {problem.hidden.dtype}: error of hidden {each[0]:.1e}, of head {each[1]:.1e}")
    return each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 256])
def test_gradients_are_no_worse_than_those_of_full_logits(dtype: torch.dtype, chunk_rows: int | None) -> None:
    problem = SMALL.problem(dtype, DEVICE, masked=0.35)
    right = exact_gradients(problem)
    step_of("full logits", problem)()
    usual = errors(problem, right, "full logits")
    problem.forget_gradients()
    fused(problem, chunk_rows=chunk_rows).backward()
    for mine, whole in zip(errors(problem, right, "ours"), usual, strict=True):
        assert mine <= 1.05 * whole + 1e-7


def fused(problem: Problem, **settings: Any) -> Tensor:
    given = {"weights": problem.weights, "denom": problem.denom, **settings}
    return linear_weighted_nll(problem.hidden, problem.head, problem.targets, **given)


def test_float64_is_float64() -> None:
    problem = SMALL.problem(torch.float64, DEVICE, masked=0.35)
    fused(problem).backward()
    assert max(errors(problem, exact_gradients(problem), "ours")) <= 1e-12


@pytest.mark.parametrize("backend", ["liger", "cce", "torch"])
def test_a_backend_gives_right_gradients_or_is_refused_by_name(backend: str) -> None:
    problem = SMALL.problem(torch.bfloat16, DEVICE, masked=0.35)
    try:
        fused(problem, backend=backend).backward()
    except RuntimeError as refused:
        print(refused)
        if "self-check" not in str(refused):
            raise
        return
    assert max(errors(problem, exact_gradients(problem), backend)) <= 0.05


def test_live_weights_are_those_of_whole_log_probs() -> None:
    problem = SMALL.problem(torch.float32, DEVICE, masked=0.35)
    live, scored = LivePear(), problem.targets != -100
    logprobs = linear_logprobs(problem.hidden, problem.head, problem.targets)
    behavior = logprobs + torch.randn_like(logprobs) / 10
    frozen = fused(problem, weights=live.weights(logprobs, behavior, scored))
    right = torch.autograd.grad(frozen, [problem.hidden, problem.head])
    of_rows = LiveWeightsOfRows(live, behavior, scored)
    loss = fused(problem, weights=of_rows, chunk_rows=128)
    assert loss.item() == pytest.approx(frozen.item(), rel=1e-5)
    for one, exact in zip(torch.autograd.grad(loss, [problem.hidden, problem.head]), right, strict=True):
        assert error_of(one, exact.double()).largest <= 1e-5


@contextmanager
def waits() -> Iterator[list[str]]:
    """What torch says of every operation that makes the host wait for the device."""
    found: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
        found += [str(one.message) for one in caught if "synchroniz" in str(one.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("is_live", [False, True])
def test_the_host_waits_once_and_not_in_backward(is_live: bool) -> None:
    problem = SMALL.problem(torch.bfloat16, DEVICE, masked=0.35)
    behavior = torch.full_like(problem.weights, -9.0)

    def loss() -> Tensor:
        if not is_live:
            return fused(problem)
        return fused(problem, weights=LiveWeightsOfRows(LivePear(), behavior, problem.targets != -100))

    loss().backward()  # compiles the kernel
    with waits() as forward:
        made = loss()
    with waits() as backward:
        made.backward()
    assert len(forward) <= 1, forward
    assert not backward


def test_a_large_problem_takes_less_than_six_gibibytes() -> None:
    problem = LARGE.problem(torch.bfloat16, DEVICE, masked=0.0)
    step_of("ours", SMALL.problem(torch.bfloat16, DEVICE, masked=0.0))()
    peak = peak_of(step_of("ours", problem), DEVICE)
    print(f"peak {peak / 2**30:.2f} GiB beyond {LARGE}")
    assert peak <= 6 * 2**30


def test_an_attached_model_trains_alike_with_and_without_logits(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "qwen2"), dtype=torch.float32).to(
        DEVICE
    )
    ids = torch.randint(10, 200, (3, 40), device=DEVICE)
    batch = {"input_ids": ids, "labels": ids, "loss_weights": torch.rand(3, 40, device=DEVICE)}
    gradients = []
    for is_fused in (False, True):
        attached = attach(copy.deepcopy(model), fused=is_fused)
        attached(**batch).loss.backward()
        gradients.append([one.grad for one in attached.parameters()])
    for plain, without in zip(*gradients, strict=True):
        torch.testing.assert_close(without, plain, rtol=1e-4, atol=1e-6)
