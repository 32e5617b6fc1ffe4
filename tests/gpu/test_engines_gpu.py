"""Both engines on CUDA against plain transformers: float32 on the same device, float64 log-softmax.

With float32 models the two may differ by rounding alone. With bfloat16 the model's own rounding is the error: it is
compared with that of plain transformers in bfloat16, the best that number type can give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import corpus, reference_logprobs, save_model
from transformers import AutoModelForCausalLM

from pear_data.engines.base import Engine
from pear_data.engines.transformers_engine import TransformersEngine
from pear_data.engines.vllm_engine import VllmEngine
from pear_data.tokens import TokenBatch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    return corpus()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda kind: save_model(folder, kind))


@pytest.fixture(scope="module")
def expected(model_dir: Callable[[str], str], batch: TokenBatch) -> Callable[[str, str], np.ndarray]:
    """Reference log-probs under a kind of model in a number type, float64."""
    return cache(
        lambda kind, dtype: reference_logprobs(model_dir(kind), batch, "cuda", getattr(torch, dtype))
    )


@pytest.fixture
def scored() -> Iterator[Callable[[Engine, TokenBatch], np.ndarray]]:
    engines: list[Engine] = []

    def score(engine: Engine, batch: TokenBatch) -> np.ndarray:
        engines.append(engine)
        return engine.score(batch, lambda tokens: None)

    yield score
    for engine in engines:
        engine.close()


def check(name: str, found: np.ndarray, exact: np.ndarray, tolerance: float) -> None:
    error = np.abs(found - exact)
    print(f"{name}: max error {error.max():.2e}, mean {error.mean():.2e}, over {len(found)} tokens")
    assert error.max() <= tolerance


@pytest.mark.parametrize("kind", ["qwen2", "llama-tied", "gemma2", "granite"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_engine(
    kind: str, dtype: str, model_dir: Any, expected: Any, batch: TokenBatch, scored: Any
) -> None:
    engine = TransformersEngine(model_dir(kind), dtype=dtype)
    assert engine.identity() | {"device": "cuda", "head": "blocked", "dtype": dtype} == engine.identity()
    exact = expected(kind, "float32")
    noise = np.abs(expected(kind, "bfloat16") - exact).max() if dtype == "bfloat16" else 0.0
    check(f"transformers {kind} {dtype}", scored(engine, batch), exact, 5e-5 + 1.5 * noise)


@pytest.mark.parametrize("kind", ["qwen2", "llama-tied"])
@pytest.mark.parametrize(
    ("path", "dtype"), [("auto", "float32"), ("classic", "float32"), ("auto", "bfloat16")]
)
def test_vllm_engine(
    kind: str, path: str, dtype: str, model_dir: Any, expected: Any, batch: TokenBatch, scored: Any
) -> None:
    engine = VllmEngine(model_dir(kind), path=path, dtype=dtype)
    assert engine.identity()["device"] == "cuda"
    exact = expected(kind, "float32")
    noise = np.abs(expected(kind, "bfloat16") - exact).max() if dtype == "bfloat16" else 0.0
    name = f"vllm {engine.identity()['path']} {kind} {dtype}"
    check(name, scored(engine, batch), exact, 1e-3 + 2 * noise)


def test_memory_does_not_follow_the_vocabulary(model_dir: Any, batch: TokenBatch) -> None:
    """The peak of scoring stays under a third of what one [tokens, vocabulary] float32 array would take."""
    engine = TransformersEngine(model_dir("qwen2"), dtype="float32")
    many = batch.take([*range(len(batch))] * 8)
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen2"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine.score(many, lambda tokens: None)
    used = torch.cuda.max_memory_allocated() - before
    engine.close()
    full = len(many.input_ids) * model.config.vocab_size * 4
    print(f"peak {used / 2**20:.0f} MiB, full logits {full / 2**20:.0f} MiB")
    assert used < full / 3
