"""Both engines against plain transformers: float32, one sample at a time, float64 log-softmax."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from pear_data.engines.transformers_engine import TransformersEngine
from pear_data.tokens import TokenBatch

ModelDir = Callable[[str], str]
Expected = Callable[[str], np.ndarray]
VllmResults = Callable[[str, str], dict[str, np.ndarray]]


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


@pytest.mark.parametrize(
    ("mode", "kind", "path"),
    [
        ("classic", "qwen2", "classic"),
        ("classic", "llama-tied", "classic"),
        ("classic", "gemma2", "classic"),
        ("spawned", "qwen2", "classic"),
        ("targets", "qwen2", "targets"),
    ],
)
def test_vllm_engine(
    mode: str,
    kind: str,
    path: str,
    vllm_results: VllmResults,
    engine_corpus: TokenBatch,
    expected: Expected,
) -> None:
    result = vllm_results(mode, kind)
    assert json.loads(str(result["identity"]))["path"] == path
    error = np.abs(result["logprobs"] - expected(kind)).max()
    print(f"vllm {mode} {kind}: max error {error:.2e} over {len(result['logprobs'])} tokens")
    assert error <= 1e-3


@pytest.mark.parametrize("mode", ["classic", "targets"])
def test_vllm_engine_scores_what_its_prefix_cache_holds(
    mode: str, vllm_results: VllmResults, engine_corpus: TokenBatch
) -> None:
    result = vllm_results(mode, "qwen2")
    last = int(engine_corpus.num_scored[-3:].sum())
    assert last > 0
    np.testing.assert_allclose(result["again"], result["logprobs"][-last:], atol=1e-4)
