"""The audit's reference against eager transformers with float64 log-softmax, for every kind of model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pear_data.stages import audit_reference
from pear_data.tokens import TokenBatch


@pytest.mark.parametrize("kind", ["qwen2", "llama-tied", "gemma2", "granite", "cohere", "gpt2"])
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
