"""The fused loss and its gradients against autograd on whole float64 logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pear_data.loss import epilogue
from pear_data.loss.fused import linear_logprobs, linear_weighted_nll

VOCAB, WIDTH = 301, 24
DENOM = 7.0
HEADS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"logit_scale": 0.25},
    {"softcap": 5.0},
    {"bias": True, "logit_scale": 1.7, "softcap": 3.0},
]


@dataclass(frozen=True)
class Problem:
    """`settings` are keyword arguments of the functions under test."""

    hidden: Tensor
    head: Tensor
    targets: Tensor
    weights: Tensor
    settings: dict[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        bias = self.settings.get("bias")
        return [self.hidden, self.head, *([] if bias is None else [bias])]

    def loss(self, **changes: Any) -> Tensor:
        arguments = {"weights": self.weights, "denom": DENOM, "chunk_rows": 16, **self.settings, **changes}
        return linear_weighted_nll(self.hidden, self.head, self.targets, **arguments)

    def exact(self) -> Problem:
        """The same numbers in float64, with gradients of their own."""
        bias = self.settings.get("bias")
        settings = self.settings if bias is None else {**self.settings, "bias": _exact(bias)}
        return replace(self, hidden=_exact(self.hidden), head=_exact(self.head), settings=settings)


def problem(
    shape: tuple[int, ...] = (3, 37),
    dtype: torch.dtype = torch.float32,
    vocabulary: int = VOCAB,
    *,
    bias: bool = False,
    **head: Any,
) -> Problem:
    """Ragged, with weights of 0, negative ones and a large one."""
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(0, vocabulary, shape, generator=generator)
    weights = torch.rand(shape, generator=generator) * 2
    flat_targets, flat_weights = targets.view(-1), weights.view(-1)
    flat_targets[: len(flat_targets) // 4] = -100
    flat_weights[len(flat_weights) // 2 : len(flat_weights) // 2 + 5] = 0.0
    flat_weights[-2:] = torch.tensor([-1.5, 148.0])[-len(flat_weights) :]
    settings = {**head, "bias": normal(vocabulary)} if bias else head
    return Problem(normal(*shape, WIDTH), normal(vocabulary, WIDTH), targets, weights, settings)


def logprobs_of_whole_logits(exact: Problem) -> Tensor:
    logits = exact.hidden @ exact.head.T
    if "bias" in exact.settings:
        logits = logits + exact.settings["bias"]
    logits = logits * exact.settings.get("logit_scale", 1.0)
    if "softcap" in exact.settings:
        logits = exact.settings["softcap"] * torch.tanh(logits / exact.settings["softcap"])
    scored = exact.targets != -100
    chosen = exact.targets.masked_fill(~scored, 0)[..., None]
    return logits.log_softmax(-1).gather(-1, chosen)[..., 0].masked_fill(~scored, 0.0)


def expected(exact: Problem) -> tuple[Tensor, list[Tensor]]:
    loss = -(exact.weights.double() * logprobs_of_whole_logits(exact)).sum() / DENOM
    return loss.detach(), list(torch.autograd.grad(loss, exact.inputs))


def assert_right(given: Problem, tolerance: float, loss: Callable[[Problem], Tensor] = Problem.loss) -> None:
    value, gradients = expected(given.exact())
    found = loss(given)
    assert found.item() == pytest.approx(value.item(), rel=tolerance)
    for gradient, right in zip(torch.autograd.grad(found, given.inputs), gradients, strict=True):
        assert relative_error(gradient, right) <= tolerance


def relative_error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).abs().max() / right.abs().max())


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 4e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 4e-3)],
)
def test_loss_and_gradients_are_those_of_whole_logits(
    head: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    assert_right(problem(dtype=dtype, **head), tolerance)


@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(1, 70),
    chunk_rows=st.integers(1, 50),
    head=st.sampled_from(HEADS),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_in_any_chunks(rows: int, vocabulary: int, chunk_rows: int, head: dict[str, Any]) -> None:
    given = problem((rows,), torch.float64, vocabulary, **head)
    value, gradients = expected(given.exact())
    found = given.loss(chunk_rows=chunk_rows)
    assert found.item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12)
    for gradient, right in zip(torch.autograd.grad(found, given.inputs), gradients, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-10)


def test_chunks_of_the_default_size_cross_blocks_and_vocabulary_tiles() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        assert_right(problem((1100,), dtype, 5003), tolerance, lambda given: given.loss(chunk_rows=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [None, 256])
def test_sixteen_bits_are_no_worse_than_whole_logits_in_sixteen_bits(
    dtype: torch.dtype, chunk_rows: int | None
) -> None:
    given = problem((2, 600), dtype, 3001)
    _, right = expected(given.exact())
    ordinary = torch.autograd.grad(loss_of_whole_logits(given), given.inputs)
    ours = torch.autograd.grad(given.loss(chunk_rows=chunk_rows), given.inputs)
    for gradient, usual, exact in zip(ours, ordinary, right, strict=True):
        assert spread(gradient, exact) <= 1.05 * spread(usual, exact)


def test_sixteen_bits_lose_nothing_over_several_chunks() -> None:
    given = problem((1000,), torch.bfloat16, 2049)
    given = replace(given, weights=given.weights.abs().clamp(0.5, 2.0))  # no row outweighs the rest
    _, right = expected(given.exact())
    ordinary = torch.autograd.grad(loss_of_whole_logits(given), given.inputs)
    ours = torch.autograd.grad(given.loss(chunk_rows=128), given.inputs)
    for gradient, usual, exact in zip(ours, ordinary, right, strict=True):
        assert spread(gradient, exact) <= 1.01 * spread(usual, exact)


def loss_of_whole_logits(given: Problem) -> Tensor:
    """By autograd in the dtype given, softmax in float32."""
    logits = (given.hidden @ given.head.T).flatten(0, -2).float()
    nll = nn.functional.cross_entropy(logits, given.targets.flatten(), reduction="none")
    return (given.weights.flatten() * nll).sum() / DENOM


def spread(found: Tensor, right: Tensor) -> float:
    """Root of the mean square of what is wrong; the largest alone is a matter of luck."""
    return float((found.double() - right).square().mean().sqrt())


@pytest.mark.parametrize("frozen", ["hidden", "head", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    given = problem(bias=True)
    named = dict(zip(("hidden", "head", "bias"), given.inputs, strict=True))
    _, gradients = expected(given.exact())
    named.pop(frozen).requires_grad_(False)
    given.loss().backward()
    for tensor, right in zip(given.inputs, gradients, strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert relative_error(tensor.grad, right) <= 1e-6
        else:
            assert tensor.grad is None


class CountedMultiplies(torch.utils._python_dispatch.TorchDispatchMode):
    """Multiply-adds of matrix products, in units of rows x vocabulary x width."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = [a for a in args if isinstance(a, Tensor)][-2:]
            self.products += left.shape[0] * left.shape[1] * right.shape[1] / (VOCAB * WIDTH)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("frozen", "multiplies"), [([], 3), (["head"], 2), (["hidden"], 2), (["hidden", "head"], 1)]
)
def test_multiplies_are_counted_and_only_rows_that_matter_are_multiplied(
    frozen: list[str], multiplies: int
) -> None:
    given = problem()
    for name in frozen:
        getattr(given, name).requires_grad_(False)
    matter = int(((given.targets != -100) & (given.weights != 0)).sum())
    with CountedMultiplies() as counted:
        loss = given.loss()
        if loss.requires_grad:
            loss.backward()
    assert counted.products == multiplies * matter


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_gradients(mode: Callable[[], Any]) -> None:
    given = problem()
    value, _ = expected(given.exact())
    matter = int(((given.targets != -100) & (given.weights != 0)).sum())
    with mode(), CountedMultiplies() as counted:
        loss = given.loss()
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(value.item(), rel=1e-6)
    assert counted.products == matter


@pytest.mark.parametrize("all_of", ["targets", "weights"])
def test_a_batch_in_which_nothing_counts_has_a_loss_and_gradients_of_zero(all_of: str) -> None:
    given = problem(bias=True)
    changed = {"targets": torch.full_like(given.targets, -100), "weights": torch.zeros_like(given.weights)}
    given = replace(given, **{all_of: changed[all_of]})
    loss = given.loss()
    loss.backward()
    assert loss.item() == 0.0
    for tensor in given.inputs:
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_rows_left_out_may_hold_anything_and_get_gradients_of_zero() -> None:
    given = problem()
    out = (given.targets == -100) | (given.weights == 0)
    with torch.no_grad():
        given.hidden[out] = float("nan")
    loss = given.loss()
    loss.backward()
    assert torch.isfinite(loss)
    assert given.hidden.grad is not None
    assert given.head.grad is not None
    assert not given.hidden.grad[out].any()
    assert torch.isfinite(given.head.grad).all()


def test_logits_far_from_zero_stay_finite() -> None:
    given = problem()
    with torch.no_grad():
        given.hidden.mul_(200)
    assert_right(given, 1e-5)


def test_a_head_tied_to_the_embedding_adds_up() -> None:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (2, 12), generator=generator)
    weights = torch.rand(2, 12, generator=generator)
    exact = torch.randn(VOCAB, WIDTH, generator=generator).double().requires_grad_()
    embedding = exact.detach().float().requires_grad_()
    hidden = torch.tanh(nn.functional.embedding(ids, embedding))
    linear_weighted_nll(hidden, embedding, ids.roll(-1, 1), weights, denom=3.0).backward()
    logits = torch.tanh(nn.functional.embedding(ids, exact)) @ exact.T
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none")
    ((weights.flatten().double() * nll).sum() / 3.0).backward()
    assert embedding.grad is not None
    assert exact.grad is not None
    assert relative_error(embedding.grad, exact.grad) <= 1e-6


def test_inputs_need_not_be_contiguous() -> None:
    given = problem()
    strided = [given.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1), given.head.detach().T]
    hidden, head = strided[0].requires_grad_(), strided[1].contiguous().T.requires_grad_()
    targets = given.targets.T.contiguous().T
    assert not hidden.is_contiguous()
    assert not head.is_contiguous()
    assert not targets.is_contiguous()
    assert_right(replace(given, hidden=hidden, head=head, targets=targets), 1e-6)


@pytest.mark.parametrize("denom", [DENOM, torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)])
def test_denominators_are_numbers_or_tensors(denom: float | Tensor) -> None:
    assert_right(problem(), 1e-6, lambda given: given.loss(denom=denom))


def test_the_gradient_that_comes_from_above_scales_ours() -> None:
    assert_right(problem(), 1e-6, lambda given: given.loss(denom=1.0) * 0.25 * 4 / DENOM)


def test_two_losses_of_one_model_add_up() -> None:
    assert_right(problem(), 1e-6, lambda given: 0.5 * given.loss() + 0.5 * given.loss())


def test_a_second_backward_pass_is_refused_by_name() -> None:
    loss = problem().loss()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call it again for another"):
        loss.backward()


def test_gradients_of_gradients_are_refused_by_name() -> None:
    given = problem()
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(given.loss(), given.hidden, create_graph=True)


@pytest.mark.parametrize("target", [-1, VOCAB])
def test_targets_outside_the_vocabulary_are_no_tokens(target: int) -> None:
    given = problem()
    given.targets[-1, -1] = target
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        given.loss()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_huge_denominator_undone_from_above_loses_nothing(dtype: torch.dtype) -> None:
    """As a loss scaler undoes it: 16 bits of a tiny gradient would be nothing."""
    given = problem(dtype=dtype)
    usual = torch.autograd.grad(given.loss(denom=1.0), given.inputs)
    scaled = torch.autograd.grad(given.loss(denom=2.0**30) * 2.0**30, given.inputs)
    for found, right in zip(scaled, usual, strict=True):
        assert relative_error(found, right.double()) <= 1e-6


def test_micro_batches_add_up_to_the_step() -> None:
    given = problem((4, 30))
    _, right = expected(given.exact())
    for part in range(4):
        one = replace(
            given, hidden=given.hidden[part], targets=given.targets[part], weights=given.weights[part]
        )
        one.loss().backward()
    for tensor, exact in zip(given.inputs, right, strict=True):
        assert tensor.grad is not None
        assert relative_error(tensor.grad, exact) <= 1e-6


def test_gradients_are_the_slope_between_two_points_nearby() -> None:
    given = problem((9,), torch.float64, 13, bias=True, softcap=4.0, logit_scale=0.7)

    def loss(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        changed = {**given.settings, "bias": bias}
        return replace(given, hidden=hidden, head=head, settings=changed).loss(chunk_rows=4)

    step = [1e-6 * torch.randn_like(one) for one in given.inputs]
    gradients = torch.autograd.grad(loss(*given.inputs), given.inputs)
    with torch.no_grad():
        ahead = loss(*(one + part for one, part in zip(given.inputs, step, strict=True)))
        behind = loss(*(one - part for one, part in zip(given.inputs, step, strict=True)))
    slope = sum(float((one * part).sum()) for one, part in zip(gradients, step, strict=True))
    assert float(ahead - behind) / 2 == pytest.approx(slope, rel=1e-6)


def test_weights_are_used_under_stop_gradient() -> None:
    given = problem()
    given.weights.requires_grad_()
    given.loss().backward()
    assert given.weights.grad is None


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_logprobs_are_those_of_whole_logits(head: dict[str, Any]) -> None:
    given = problem(**head)
    found = linear_logprobs(given.hidden, given.head, given.targets, chunk_rows=16, **given.settings)
    assert found.shape == given.targets.shape
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(
        found.double(), logprobs_of_whole_logits(given.exact()).detach(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)])
def test_live_weights_are_asked_for_from_the_last_chunk_to_the_first(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    """And in 16 bits within a chunk from the last rows in the processor's cache to the first."""
    monkeypatch.setattr(epilogue, "_CACHE_BYTES_A_THREAD", 3 * 4 * VOCAB)
    given = problem(dtype=dtype)
    weights = given.weights.flatten()
    seen: list[Tensor] = []
    logprobs = torch.zeros_like(weights)

    def of_rows(rows: Tensor, of_targets: Tensor) -> Tensor:
        assert not of_targets.requires_grad
        seen.insert(0, rows)
        logprobs[rows] = of_targets
        return weights[rows]

    with CountedMultiplies() as counted:
        loss = given.loss(weights=of_rows)
    value, gradients = expected(given.exact())
    assert loss.item() == pytest.approx(value.item(), rel=tolerance)
    for gradient, right in zip(torch.autograd.grad(loss, given.inputs), gradients, strict=True):
        assert relative_error(gradient, right) <= tolerance
    scored = (given.targets.flatten() != -100).nonzero()[:, 0]
    chunks = math.ceil(len(scored) / 16)
    assert len(seen) == chunks if dtype == torch.float32 else len(seen) > chunks + 1
    torch.testing.assert_close(torch.cat(seen), scored)
    # Of a head of 16 bits over several chunks what its gradient's sums round off is multiplied as well.
    assert counted.products == (3 if dtype == torch.float32 else 4) * len(scored)
    everywhere = linear_logprobs(given.hidden, given.head, given.targets).flatten()
    torch.testing.assert_close(logprobs, everywhere, rtol=0, atol=2e-6)


def test_under_autocast_the_multiplies_have_its_dtype_and_float32_gets_float32_gradients() -> None:
    given = problem((2, 300), vocabulary=2001)
    _, right = expected(given.exact())
    with torch.autocast("cpu", torch.bfloat16):
        loss = given.loss(chunk_rows=128)
        usual = loss_of_whole_logits(given)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, given.inputs)
    for gradient, ordinary, exact in zip(found, torch.autograd.grad(usual, given.inputs), right, strict=True):
        assert gradient.dtype == torch.float32
        assert 0 < spread(gradient, exact) <= 1.05 * spread(ordinary, exact)


def test_a_compiled_model_gets_the_same() -> None:
    given = problem()

    @torch.compile(backend="eager")
    def step(hidden: Tensor, head: Tensor) -> Tensor:
        doubled = hidden * 2
        return replace(given, hidden=doubled / 2, head=head).loss() * 1.0

    assert_right(given, 1e-6, lambda given: step(given.hidden, given.head))


def test_recomputed_in_backward_it_is_the_same() -> None:
    assert_right(
        problem(),
        1e-6,
        lambda given: torch.utils.checkpoint.checkpoint(
            lambda hidden: replace(given, hidden=hidden).loss(), given.hidden, use_reentrant=False
        ),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": torch.zeros(5, WIDTH + 1)}, "must be"),
        ({"targets": torch.zeros(3, 36, dtype=torch.int64)}, "must be"),
        ({"weights": torch.zeros(3, 36)}, "must have one shape"),
        ({"settings": {"bias": torch.zeros(5)}}, "bias must be"),
        ({"head": torch.zeros(5, WIDTH, dtype=torch.bfloat16)}, "several dtypes"),
        ({"settings": {"backend": "fastest"}}, "backend 'fastest' is unknown: ours, cce, liger, torch"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(problem(), **change).loss()
