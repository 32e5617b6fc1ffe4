from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pear_data.engines import head as head_module
from pear_data.engines.head import BlockedHead, full_logprobs


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.ROW_BLOCK, "cpu", 8)
    monkeypatch.setitem(head_module.VOCAB_BLOCK, "cpu", 16)


def reference(head: BlockedHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits += head.bias
    logits *= head.scale
    if head.soft_cap:
        logits = head.soft_cap * (logits / head.soft_cap).tanh()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("rows", [1, 8, 21])
@pytest.mark.parametrize("vocab", [5, 16, 50])
@pytest.mark.parametrize(
    ("bias", "scale", "soft_cap"), [(False, 1.0, None), (True, 0.25, None), (True, 2.0, 3.0)]
)
def test_blocked_logprobs(rows: int, vocab: int, bias: bool, scale: float, soft_cap: float | None) -> None:
    torch.manual_seed(rows * vocab)
    head = BlockedHead(torch.randn(vocab, 12), torch.randn(vocab) if bias else None, scale, soft_cap)
    hidden, targets = torch.randn(rows, 12), torch.randint(vocab, (rows,))
    torch.testing.assert_close(
        head.logprobs(hidden, targets).double(), reference(head, hidden, targets), atol=2e-6, rtol=1e-6
    )


def test_logits_of_a_thousand_nats_do_not_overflow() -> None:
    weight = torch.zeros(40, 2)
    weight[0, 0], weight[39, 0] = -1000.0, 1000.0
    head = BlockedHead(weight, None, 1.0, None)
    found = head.logprobs(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([39, 1, 0]))
    assert found.tolist() == [0.0, -1000.0, -2000.0]


def test_16_bit_inputs_are_not_rounded_again() -> None:
    torch.manual_seed(0)
    weight, hidden, targets = torch.randn(50, 64), torch.randn(9, 64), torch.randint(50, (9,))
    for dtype, bits in ((torch.bfloat16, 17), (torch.float16, 21)):
        head = BlockedHead(weight.to(dtype), None, 1.0, None)
        error = head.logprobs(hidden.to(dtype), targets).double() - reference(head, hidden.to(dtype), targets)
        largest = (hidden.to(dtype).double() @ head.weight.double().T).abs().max()
        assert error.abs().max() < largest * 2.0**-bits
        assert largest * 2.0**-9 > 0.04  # what one rounding to bfloat16 would add


def test_a_cpu_that_rounds_before_it_subtracts_takes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_residuals_are_fused", lambda: False)
    torch.manual_seed(0)
    head = BlockedHead(torch.randn(50, 64).bfloat16(), None, 1.0, None)
    hidden, targets = torch.randn(9, 64).bfloat16(), torch.randint(50, (9,))
    error = head.logprobs(hidden, targets).double() - reference(head, hidden, targets)
    assert error.abs().max() < 1e-5


def test_a_certain_token_has_log_prob_zero_and_not_more() -> None:
    torch.manual_seed(0)
    head = BlockedHead(torch.randn(300, 64), None, 1.0, None)
    hidden = 3 * head.weight[:200]
    found = head.logprobs(hidden, torch.arange(200))
    assert found.max() == 0.0
    assert found.min() > -1e-4


def test_nan_stays_nan() -> None:
    head = BlockedHead(torch.randn(50, 4), None, 1.0, None)
    hidden = torch.randn(3, 4)
    hidden[1] = torch.nan
    assert head.logprobs(hidden, torch.tensor([1, 2, 3])).isnan().tolist() == [False, True, False]


def test_full_logprobs() -> None:
    logits, targets = torch.randn(21, 50), torch.randint(50, (21,))
    expected = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(full_logprobs(logits, targets).double(), expected, atol=2e-6, rtol=1e-6)


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [each.numel() for each in results if isinstance(each, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_nothing_larger_than_the_inputs_and_one_block_is_ever_made() -> None:
    head = BlockedHead(torch.randn(2000, 4), None, 1.0, None)
    hidden, targets = torch.randn(200, 4), torch.randint(2000, (200,))
    with LargestResult() as largest:
        head.logprobs(hidden, targets)
    assert largest.elements <= 8_000  # the weights themselves; tokens x vocabulary would be 400,000
