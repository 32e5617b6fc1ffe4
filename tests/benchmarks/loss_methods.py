"""What tests/benchmarks/loss.py compares: weighted losses from hidden states and a head, forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pear_data.loss.fused import linear_weighted_nll

IGNORED = -100


class MissingError(Exception):
    """A package or a device is not here."""


@dataclass
class Problem:
    """`hidden` [N, H] predicts `targets` [N] through `head` [V, H]; the loss is sum(weights * nll) / denom."""

    hidden: Tensor
    head: Tensor
    targets: Tensor
    weights: Tensor
    denom: int

    def forget_gradients(self) -> None:
        self.hidden.grad = self.head.grad = None


@dataclass(frozen=True)
class Shape:
    rows: int
    vocabulary: int
    width: int

    def problem(self, dtype: torch.dtype, device: str, masked: float) -> Problem:
        """The same numbers in every process: logits that spread over two nats, weights over a few factors of e."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            # In the memory it keeps, so that none is freed before memory is measured.
            return torch.empty(size, dtype=dtype, device=device).normal_(std=std, generator=generator)

        targets = torch.randint(self.vocabulary, (self.rows,), generator=generator, device=device)
        out = torch.rand(self.rows, generator=generator, device=device) < masked
        targets.masked_fill_(out, IGNORED)
        weights = (
            torch.empty(self.rows, device=device).normal_(generator=generator).exp_().masked_fill_(out, 0)
        )
        hidden = normal(self.rows, self.width).requires_grad_()
        head = normal(self.vocabulary, self.width, std=2 / self.width**0.5).requires_grad_()
        return Problem(hidden, head, targets, weights, int((~out).sum()))


Step = Callable[[], None]
Loss = Callable[[Problem], Tensor]


def step_of(method: str, problem: Problem) -> Step:
    """Forward and backward of a method; its gradients are where autograd puts them. Raises MissingError."""
    if method == "floor":
        return _floor(problem)
    loss = LOSSES[method](problem)

    def step() -> None:
        problem.forget_gradients()
        loss(problem).backward()

    return step


def _floor(problem: Problem) -> Step:
    """The three matrix products, each whole, into memory that is there."""
    hidden, head = problem.hidden.detach(), problem.head.detach()
    logits = hidden.new_empty(len(hidden), len(head))
    by_hidden, by_head = torch.empty_like(hidden), torch.empty_like(head)

    def step() -> None:
        torch.mm(hidden, head.T, out=logits)
        torch.mm(logits, head, out=by_hidden)
        torch.mm(logits.T, hidden, out=by_head)

    return step


def _weighted(nll: Tensor, problem: Problem) -> Tensor:
    return (problem.weights * nll.float()).sum() / problem.denom


def _full(_: Problem) -> Loss:
    """transformers' ForCausalLMLoss, with a weight per token."""

    def loss(problem: Problem) -> Tensor:
        logits = F.linear(problem.hidden, problem.head).float()
        nll = F.cross_entropy(logits, problem.targets, ignore_index=IGNORED, reduction="none")
        return _weighted(nll, problem)

    return loss


def _torch(_: Problem) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise MissingError(f"needs torch 2.13, here is {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(problem: Problem) -> Tensor:
        nll = F.linear_cross_entropy(
            problem.hidden, problem.head, problem.targets, reduction="none", options=options
        )
        return _weighted(nll, problem)

    return loss


def _liger(problem: Problem) -> Loss:
    with _required("liger-kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    _require_cuda(problem)
    module = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda problem: _weighted(module(problem.head, problem.hidden, problem.targets), problem)


def _trl(problem: Problem) -> Loss:
    with _required("trl"):
        from trl.trainer.utils import add_fused_lm_head
    model: Any = _HeadOnly(problem)
    add_fused_lm_head(model)

    def loss(problem: Problem) -> Tensor:
        found = model(hidden=problem.hidden[None], shift_labels=problem.targets[None], fused_lm_head=True)
        return _weighted(-found.log_probs[0], problem)

    return loss


class _HeadOnly(torch.nn.Module):
    """What TRL's fused head asks of a model, around hidden states that are there."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type="none"))
        self._head = SimpleNamespace(weight=problem.head, bias=None)

    def forward(self) -> None:
        """Replaced by TRL."""

    def base_model(self, *, hidden: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self) -> Any:
        return self._head


def _cce(problem: Problem) -> Loss:
    with _required("cut-cross-entropy"):
        from cut_cross_entropy import linear_cross_entropy
    _require_cuda(problem)

    def loss(problem: Problem) -> Tensor:
        # With its filter it drops small gradients before they are weighted.
        nll = linear_cross_entropy(
            problem.hidden, problem.head, problem.targets, reduction="none", filter_eps=None
        )
        return _weighted(nll, problem)

    return loss


def _ours(_: Problem) -> Loss:
    return lambda problem: linear_weighted_nll(
        problem.hidden, problem.head, problem.targets, problem.weights, denom=problem.denom
    )


@contextlib.contextmanager
def _required(distribution: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingError(f"{distribution} cannot be imported ({error})") from error


def _require_cuda(problem: Problem) -> None:
    if not problem.hidden.is_cuda:
        raise MissingError(
            "needs CUDA (tests/unit/loss/test_fused_backends.py has its gradients in the interpreter)"
        )


LOSSES: dict[str, Callable[[Problem], Loss]] = {
    "full logits": _full,
    "torch": _torch,
    "liger": _liger,
    "trl": _trl,
    "cce": _cce,
    "ours": _ours,
}
METHODS = (*LOSSES, "floor")


def exact_gradients(problem: Problem, rows_at_once: int = 512) -> dict[str, Tensor]:
    """By the hidden states and the head, in float64 from the same numbers, through whole rows of logits."""
    hidden, head = problem.hidden.detach(), problem.head.detach().double()
    by_hidden, by_head = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(head)
    for rows in (problem.targets != IGNORED).nonzero()[:, 0].split(rows_at_once):
        states = hidden[rows].double()
        slope = (states @ head.T).softmax(1)
        slope[torch.arange(len(rows)), problem.targets[rows]] -= 1
        slope *= (problem.weights[rows].double() / problem.denom)[:, None]
        by_hidden[rows] = slope @ head
        by_head.addmm_(slope.T, states)
    return {"hidden": by_hidden, "head": by_head}
