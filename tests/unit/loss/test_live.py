"""Live weights against the golden vectors, the weighting kernels and the formulas; what they cost the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pear_data import importance_weights
from pear_data.loss import LivePear, LiveWeightsOfRows, live_weights

GOLDEN = json.loads((Path(__file__).parents[2] / "reference" / "golden_weights.json").read_text())
LEVELS = ["token", "block", "sequence"]
OPTIONS = ("block_size", "gamma", "clip_log_ratio", "clip_log_weight")


def frozen(target: Tensor, behavior: Tensor, lengths: list[int], **options: Any) -> Tensor:
    return torch.from_numpy(
        importance_weights(target.double().numpy(), behavior.double().numpy(), lengths, **options)
    )


@pytest.mark.parametrize("level", LEVELS)
def test_golden_vectors(level: Any) -> None:
    for case in GOLDEN:
        options = {name: case[name] for name in OPTIONS if name in case}
        target, behavior = (torch.tensor(case[name], dtype=torch.float64) for name in ("target", "behavior"))
        found = live_weights(target, behavior, torch.ones_like(target), level=level, **options)
        np.testing.assert_allclose(found.numpy(), case["weights"][level], rtol=1e-6)


@st.composite
def batches(draw: Any) -> dict[str, Any]:
    """Rows of one or several sequences with holes, what is unscored being NaN."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    mask = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.0, 0.4, 0.9, 1.0]))
    ids = (torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.0, 0.2]))).cumsum(1)
    target = -3 * torch.rand(rows, length, generator=generator)
    behavior = target - draw(st.sampled_from([0.1, 2.0])) * torch.randn(rows, length, generator=generator)
    behavior = behavior.masked_fill(~mask, float("nan"))
    negative = ids % 3 == 1
    return {"target": target, "behavior": behavior, "mask": mask, "ids": ids, "negative": negative}


def expected(batch: dict[str, Any], level: Any, negative_scale: float | None) -> Tensor:
    """A sequence at a time, by the kernels of `pear-data weight`."""
    weights = torch.zeros_like(batch["target"])
    for row in range(len(weights)):
        for one in batch["ids"][row].unique():
            where = (batch["ids"][row] == one) & batch["mask"][row]
            target, behavior = batch["target"][row][where], batch["behavior"][row][where]
            negative = negative_scale is not None and bool(
                batch["negative"][row][batch["ids"][row] == one][0]
            )
            found = frozen(target, behavior, [len(target)], level="sequence" if negative else level)
            weights[row][where] = found * (-negative_scale if negative else 1.0)  # type: ignore[operator]
    return weights


@settings(max_examples=60, deadline=None)
@given(batch=batches(), level=st.sampled_from(LEVELS), negative_scale=st.sampled_from([None, 0.0, 0.5]))
def test_every_sequence_of_a_pack_is_weighted_by_itself(
    batch: dict[str, Any], level: Any, negative_scale: float | None
) -> None:
    scale = (
        {} if negative_scale is None else {"negative_scale": negative_scale, "negative": batch["negative"]}
    )
    found = live_weights(
        batch["target"], batch["behavior"], batch["mask"], batch["ids"], level=level, **scale
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(batch, level, negative_scale), rtol=2e-6, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(batch=batches(), level=st.sampled_from(["token", "block"]), size=st.integers(1, 50))
def test_chunks_from_the_last_to_the_first_give_the_same(
    batch: dict[str, Any], level: Any, size: int
) -> None:
    live = LivePear(level=level)
    whole = live.weights(batch["target"], batch["behavior"], batch["mask"], batch["ids"])
    of_rows = LiveWeightsOfRows(live, batch["behavior"], batch["mask"], batch["ids"])
    found = torch.zeros(batch["mask"].numel())
    for rows in reversed(torch.split(batch["mask"].reshape(-1).nonzero()[:, 0], size)):
        found[rows] = of_rows(rows, batch["target"].reshape(-1)[rows])
    torch.testing.assert_close(found.view(whole.shape), whole, rtol=1e-6, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    batch=batches(), level=st.sampled_from(LEVELS), has_negatives=st.booleans(), sequences=st.integers(1, 5)
)
def test_chunks_of_whole_sequences_give_the_same(
    batch: dict[str, Any], level: Any, has_negatives: bool, sequences: int
) -> None:
    live = LivePear(level=level, negative_scale=0.5)
    columns = [batch["behavior"], batch["mask"], batch["ids"], batch["negative"] if has_negatives else None]
    whole = live.weights(batch["target"], *columns)
    of_rows = LiveWeightsOfRows(live, *columns)
    rows, begins = batch["mask"].reshape(-1).nonzero()[:, 0], of_rows.begins_of_sequences()
    if begins is None:
        assert level != "sequence"
        assert not has_negatives
        begins = torch.arange(len(rows))
    lengths = torch.tensor([len(part) for part in torch.tensor_split(rows, begins[1:])])
    assert has_negatives or level != "sequence" or of_rows.longest_sequence() == int(lengths.max())
    found = torch.zeros(batch["mask"].numel())
    for part in reversed(torch.tensor_split(rows, begins[sequences::sequences])):
        if len(part):
            found[part] = of_rows(part, batch["target"].reshape(-1)[part])
    torch.testing.assert_close(found.view(whole.shape), whole, rtol=1e-6, atol=1e-9)


def test_no_gradient_flows_through_them() -> None:
    logprobs = torch.randn(2, 5).requires_grad_()
    assert not live_weights(logprobs, torch.randn(2, 5), torch.ones(2, 5)).requires_grad


class WaitsForTheDevice(TorchDispatchMode):
    """Fails on what reads a tensor on the host, or has a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), name
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_waits_for_the_device(level: Any) -> None:
    logprobs, mask = torch.randn(2, 9), torch.rand(2, 9) < 0.5
    ids, negative = torch.arange(9).expand(2, 9) // 4, torch.zeros(2, 9, dtype=torch.bool)
    live = LivePear(level=level, negative_scale=0.5)
    with WaitsForTheDevice():
        live.weights(logprobs, logprobs - 0.1, mask, ids, negative)
        of_rows = LiveWeightsOfRows(live, logprobs - 0.1, torch.ones_like(mask), ids, negative)
        of_rows(torch.arange(9, 18), logprobs[1])
        of_rows(torch.arange(9), logprobs[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, "level is 'word': token, block or sequence"),
        ({"block_size": 0}, "block_size >= 1"),
        ({"gamma": 1.5}, "0 < gamma <= 1"),
        ({"negative_scale": -1.0}, "negative_scale >= 0"),
        ({"clip_log_ratio": (0.3, -0.08)}, "clip_log_ratio is 0.3 to -0.08: the lower bound comes first"),
    ],
)
def test_settings_outside_their_bounds_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LivePear(**options)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"behavior_logprobs \[2, 4\].*must have one shape"):
        live_weights(torch.zeros(2, 5), torch.zeros(2, 4), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"mask \[5\], negative \[4\] must have one shape"):
        LiveWeightsOfRows(LivePear(), torch.zeros(5), torch.ones(5), negative=torch.zeros(4))
