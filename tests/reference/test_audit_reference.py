"""The audit's reference against eager transformers with float64 log-softmax."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pear_data.stages import audit_reference
from pear_data.tokens import TokenBatch


@pytest.mark.parametrize("kind", ["gemma2", "granite", "gpt2"])
def test_plain_float32(
    kind: str,
    model_dir: Callable[[str], str],
    engine_corpus: TokenBatch,
    expected: Callable[[str], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Half of the rows of the longest sample a pass, so that blocks of rows have to fit together.
    monkeypatch.setattr(audit_reference, "LOGITS", 1000 * 3000)
    reference = audit_reference.PlainFloat32(model_dir(kind), None, False)
    worst = 0.0
    for row in range(len(engine_corpus)):
        sample = engine_corpus.take([row])
        found = reference.logprobs(sample.input_ids, sample.loss_mask) if sample.loss_mask.any() else []
        scored = slice(*engine_corpus.scored_offsets[row : row + 2])
        worst = max(worst, np.abs(found - expected(kind)[scored]).max(initial=0))
    reference.close()
    assert reference.description.startswith("transformers ")
    assert worst <= 2e-5


def test_a_sample_without_room_on_the_device_moves_the_model_to_the_cpu(
    model_dir: Callable[[str], str], engine_corpus: TokenBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_reference, "_device", lambda needed: "cpu:0")  # stands in for a GPU
    reference = audit_reference.PlainFloat32(model_dir("qwen2"), None, False)
    sample = engine_corpus.take([int(engine_corpus.num_scored.argmax())])
    whole = reference.logprobs(sample.input_ids, sample.loss_mask)
    compute, calls = reference._block, 0

    def without_room_at_first(ids: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(ids, scored)

    monkeypatch.setattr(reference, "_block", without_room_at_first)
    np.testing.assert_array_equal(reference.logprobs(sample.input_ids, sample.loss_mask), whole)
    assert reference.description.endswith("in float32 on cpu:0, then cpu")
