"""The loss and its gradient against the formula written out in float64, and against transformers' own loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from pear_data.loss import causal_loss, weighted_nll

VOCAB = 23


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three ragged rows, padded on the right; weights with zeros, a negative one and a large one."""
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(3, 9, VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (3, 9), generator=generator)
    weights = 4 * torch.rand(3, 9, generator=generator)
    for row, (prompt, length) in enumerate([(2, 9), (4, 6), (1, 3)]):
        labels[row, :prompt] = labels[row, length:] = -100
    labels[0, 5] = -100
    weights = weights.masked_fill(labels == -100, 0.0)
    weights[0, 3], weights[0, 6], weights[1, 4] = 0.0, -1.5, 148.0
    return {"logits": logits, "labels": labels, "loss_weights": weights}


def written_out(batch: dict[str, Tensor], denom: float) -> tuple[Tensor, Tensor]:
    """Loss and its gradient on the logits, token by token: sum of w[t] * -log p(label[t] | logits[t - 1]) / denom."""
    logits = batch["logits"].double().requires_grad_()
    logprobs = logits.log_softmax(-1)
    loss = torch.zeros((), dtype=torch.float64)
    for row, column in (batch["labels"] != -100).nonzero().tolist():
        token, weight = batch["labels"][row, column], batch["loss_weights"][row, column].double()
        loss = loss - weight * logprobs[row, column - 1, token] / denom
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("denom", [None, 31, torch.tensor(31), torch.tensor([31])])
def test_causal_loss_and_gradient_are_the_formula(
    batch: dict[str, Tensor], denom: Tensor | int | None
) -> None:
    expected, expected_grad = written_out(
        batch, 31 if denom is not None else int((batch["labels"] != -100).sum())
    )
    logits = batch["logits"].requires_grad_()
    loss = causal_loss(**batch, vocab_size=VOCAB, num_items_in_batch=denom)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach().sum()) == pytest.approx(float(expected), rel=1e-6)
    assert logits.grad is not None
    assert relative_error(logits.grad, expected_grad) < 1e-6


def test_weighted_nll_and_gradient_are_the_formula_in_float64(batch: dict[str, Tensor]) -> None:
    expected, expected_grad = written_out(batch, 31)
    logits = batch["logits"].double().requires_grad_()
    targets = batch["labels"][:, 1:]
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    loss = weighted_nll(logprobs, batch["loss_weights"][:, 1:], targets != -100, denom=31)
    loss.backward()
    assert loss.dtype == torch.float64
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-12)
    assert logits.grad is not None
    assert relative_error(logits.grad, expected_grad) < 1e-12


@pytest.mark.parametrize("denom", [None, 31, torch.tensor(31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shifted", [False, True])
def test_without_weights_it_is_transformers_loss(
    batch: dict[str, Tensor], denom: Tensor | int | None, dtype: torch.dtype, shifted: bool
) -> None:
    labels = batch["labels"]
    kwargs = {
        "logits": batch["logits"].to(dtype),
        "labels": None if shifted else labels,
        "shift_labels": torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        if shifted
        else None,
        "vocab_size": VOCAB,
        "num_items_in_batch": denom,
    }
    assert torch.equal(causal_loss(**kwargs), ForCausalLMLoss(**kwargs))


@pytest.mark.parametrize("denom", [None, 31])
def test_weights_of_one_are_transformers_loss(batch: dict[str, Tensor], denom: int | None) -> None:
    plain = ForCausalLMLoss(batch["logits"], batch["labels"], VOCAB, denom)
    batch["loss_weights"] = torch.ones_like(batch["loss_weights"])
    torch.testing.assert_close(causal_loss(**batch, vocab_size=VOCAB, num_items_in_batch=denom), plain)


def test_labels_shifted_by_the_caller_change_nothing(batch: dict[str, Tensor]) -> None:
    expected = causal_loss(**batch, vocab_size=VOCAB)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    for labels in (batch["labels"], None):
        loss = causal_loss(**{**batch, "labels": labels}, vocab_size=VOCAB, shift_labels=shifted)
        assert torch.equal(loss, expected)


def test_another_ignore_index(batch: dict[str, Tensor]) -> None:
    expected = causal_loss(**batch, vocab_size=VOCAB)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, -1)
    assert torch.equal(causal_loss(**batch, vocab_size=VOCAB, ignore_index=-1), expected)


def test_bf16_logits_are_summed_in_float32(batch: dict[str, Tensor]) -> None:
    batch["logits"] = batch["logits"].bfloat16()
    expected, _ = written_out(batch, 31)
    loss = causal_loss(**batch, vocab_size=VOCAB, num_items_in_batch=31)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_no_gradient_through_the_weights(batch: dict[str, Tensor]) -> None:
    weights = batch["loss_weights"].requires_grad_()
    causal_loss(batch["logits"].requires_grad_(), batch["labels"], VOCAB, loss_weights=weights).backward()
    assert weights.grad is None


def test_a_batch_with_nothing_scored_has_loss_zero(batch: dict[str, Tensor]) -> None:
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert float(causal_loss(**batch, vocab_size=VOCAB)) == 0.0


def test_values_outside_the_mask_are_never_used() -> None:
    logprobs = torch.tensor([-1.0, -torch.inf, torch.nan], requires_grad=True)
    weights = torch.tensor([2.0, torch.nan, torch.inf])
    loss = weighted_nll(logprobs, weights, torch.tensor([1, 0, 0]), denom=torch.tensor(4))
    loss.backward()
    assert float(loss.detach()) == 0.5
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.5, 0.0, 0.0]


def test_bf16_logprobs_are_summed_in_float32() -> None:
    logprobs = torch.full((5000,), -1.0, dtype=torch.bfloat16)
    ones = torch.ones(5000)
    assert float(weighted_nll(logprobs, ones, ones, denom=1)) == 5000.0


def test_nothing_is_read_from_the_device() -> None:
    """Tensors on the meta device have no values: any `.item()` or truth test would raise."""
    logits = torch.randn(2, 5, VOCAB, device="meta", requires_grad=True)
    labels = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    weights = torch.ones(2, 5, device="meta")
    count_elsewhere = torch.tensor([10])
    for num_items in (None, count_elsewhere):
        causal_loss(logits, labels, VOCAB, num_items, loss_weights=weights).sum().backward()
        causal_loss(logits, labels, VOCAB, num_items).sum().backward()


def test_shapes_that_differ_are_refused(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"loss_weights \[3, 8\] and labels \[3, 9\] must have one shape"):
        causal_loss(batch["logits"], batch["labels"], VOCAB, loss_weights=batch["loss_weights"][:, 1:])
    with pytest.raises(ValueError, match=r"logprobs \[3\], weights \[1\] and mask \[3\]"):
        weighted_nll(torch.zeros(3), torch.ones(1), torch.ones(3), denom=1)


def test_label_smoothing_is_refused(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="label smoothing"):
        causal_loss(**batch, vocab_size=VOCAB, label_smoothing=0.1)


def test_a_batch_without_labels_is_refused(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="neither labels nor shift_labels"):
        causal_loss(batch["logits"], None, VOCAB)
