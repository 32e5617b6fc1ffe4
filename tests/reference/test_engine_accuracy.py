"""The transformers engine against plain transformers: float32, one sample at a time, float64 log-softmax."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pear_data.engines.transformers_engine import TransformersEngine
from pear_data.tokens import TokenBatch

ModelDir = Callable[[str], str]
Expected = Callable[[str], np.ndarray]


@pytest.mark.parametrize("kind", ["qwen2", "llama-tied", "gemma2", "granite", "cohere", "gpt2"])
def test_transformers_engine(
    kind: str, model_dir: ModelDir, engine_corpus: TokenBatch, expected: Expected
) -> None:
    engine = TransformersEngine(model_dir(kind), device="cpu")
    assert engine.identity()["head"] == "blocked"
    found = engine.score(engine_corpus, lambda tokens: None)
    engine.close()
    error = np.abs(found - expected(kind)).max()
    print(f"transformers {kind}: max error {error:.2e} over {len(found)} tokens")
    assert error <= 2e-5
