"""Denominators of batches against the rows they were made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pear_data.loss import LivePear, PearCollator, attach, denominator
from pear_data.loss.normaliser import require_normaliser

ROWS: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "loss_weights": [0.0, 0.5, 2.0]},
    {"input_ids": [4, 5], "labels": [-100, -100], "loss_weights": [0.0, 0.0]},
    {"input_ids": [6, 7, 8, 9], "labels": [-100, 7, -100, 9], "loss_weights": [0.0, -1.0, 0.0, 0.25]},
]
EXPECTED = {"tokens": 4, "weights": 1.75, "sequences": 2}


@pytest.mark.parametrize("normaliser", EXPECTED)
@pytest.mark.parametrize("layout", [{}, {"pad_to_multiple_of": 8}, {"padding_free": True}], ids=str)
def test_of_a_batch(normaliser: Any, layout: dict[str, Any]) -> None:
    batch = PearCollator(0, **layout)(ROWS)
    found = denominator(batch, normaliser)
    assert found.dtype == torch.float32
    assert float(found) == EXPECTED[normaliser]
    if "seq_idx" in batch:
        del batch["seq_idx"]
        assert float(denominator(batch, normaliser)) == EXPECTED[normaliser], "positions tell the same"


def test_the_first_token_is_never_predicted() -> None:
    row = {"input_ids": [1, 2], "labels": [1, 2], "loss_weights": [3.0, 1.0]}
    batch = PearCollator(0)([row])
    assert [float(denominator(batch, n)) for n in ("tokens", "weights", "sequences")] == [1, 1, 1]


@pytest.mark.parametrize("normaliser", [7.0, "words"])
def test_what_is_no_sum_of_parts_is_refused(normaliser: Any) -> None:
    with pytest.raises(ValueError, match=r"tokens, weights, sequences"):
        denominator(PearCollator(0)(ROWS), normaliser)


@pytest.mark.parametrize(
    ("normaliser", "live", "message"),
    [
        ("words", None, "normaliser is 'words': tokens, weights, sequences, or a number"),
        (0.0, None, "a number must be above 0"),
        (float("nan"), None, "a number must be above 0"),
        ("weights", LivePear(), "live weights are not known before the step"),
    ],
)
def test_what_cannot_be_is_refused(normaliser: Any, live: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_normaliser(normaliser, live)
    with pytest.raises(ValueError, match=message):
        attach(torch.nn.Linear(1, 1), live=live, normaliser=normaliser)
