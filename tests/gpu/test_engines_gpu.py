"""Both engines on CUDA against plain transformers: float32 on the same device, float64 log-softmax.

With float32 models the two may differ by rounding alone. With bfloat16 the model's own rounding is the error: it is
compared with that of plain transformers in bfloat16, the best that number type can give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from test_packed_attention import PACKED
from test_packed_attention import corpus as packed_corpus
from tiny_models import CONFIGS, VOCAB, corpus, reference_logprobs, save_model
from transformers import AutoModelForCausalLM
from vllm_models import groups, save_large_logits

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
    expected_identity = {"device": "cuda", "head": "blocked", "attention": "packed", "dtype": dtype}
    assert engine.identity() | expected_identity == engine.identity()
    exact = expected(kind, "float32")
    noise = np.abs(expected(kind, "bfloat16") - exact).max() if dtype == "bfloat16" else 0.0
    check(f"transformers {kind} {dtype}", scored(engine, batch), exact, 5e-5 + 1.5 * noise)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packs_with_shared_prompts(
    kind: str, dtype: str, scored: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    """In bfloat16 the variable-length kernel of torch computes what the loop over sequences does in float32."""
    monkeypatch.setitem(CONFIGS, "model", PACKED[kind])
    model, batch = save_model(tmp_path, "model"), packed_corpus()
    exact = reference_logprobs(model, batch, "cuda")
    noise = 0.0
    if dtype == "bfloat16":
        noise = float(np.abs(reference_logprobs(model, batch, "cuda", torch.bfloat16) - exact).max())
    engine = TransformersEngine(model, dtype=dtype)
    assert engine.identity()["attention"] == "packed"
    check(f"packed {kind} {dtype}", scored(engine, batch), exact, 5e-5 + 1.5 * noise)


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


def test_vllm_runs_a_shared_prompt_once(model_dir: Any, scored: Any) -> None:
    """Of 13 requests the first of each of three groups runs its prompt; none has to be asked for again."""
    engine = VllmEngine(model_dir("qwen2"), dtype="float32", engine_args={"gpu_memory_utilization": 0.5})
    cached: list[int] = []
    generate = engine._process.generate

    def watched(prompts: Any, parameters: Any) -> Iterator[tuple[int, Any]]:
        for index, output in generate(prompts, parameters):
            cached.append(output.num_cached_tokens)
            yield index, output

    engine._process.generate = watched
    grouped = groups()
    found = scored(engine, grouped)
    exact = reference_logprobs(model_dir("qwen2"), grouped, "cuda")
    check(f"vllm {engine.identity()['path']} grouped", found, exact, 1e-3)
    assert engine.identity()["engine_arg.gpu_memory_utilization"] == 0.5
    print(f"tokens found in the cache: {sorted(cached)}")
    if engine.identity()["path"] == "targets":
        assert len(cached) == 13
        assert sorted(cached)[:3] == [0] * 3
        assert sorted(cached)[3] >= 128


def test_a_float32_head_of_vllm_is_nearer_to_float32(model_dir: Any, scored: Any, tmp_path: Any) -> None:
    model = save_large_logits(model_dir("qwen2"), tmp_path / "large-logits")
    exact = reference_logprobs(model, groups(), "cuda")
    error = {}
    for head_dtype in ("model", "float32"):
        engine = VllmEngine(model, dtype="bfloat16", head_dtype=head_dtype, tensor_parallel=1)
        assert engine.identity() | {"head_dtype": head_dtype, "tensor_parallel": 1} == engine.identity()
        error[head_dtype] = np.abs(scored(engine, groups()) - exact).mean()
        engine.close()
    print(f"mean error by head: {error}")
    assert error["float32"] < 0.7 * error["model"]


def test_memory_does_not_follow_the_vocabulary(model_dir: Any, batch: TokenBatch) -> None:
    """The peak of scoring stays under a third of what one [tokens, vocabulary] float32 array would take."""
    engine = TransformersEngine(model_dir("qwen2"), dtype="float32")
    many = batch.take([*range(len(batch))] * 8)
    copies = np.repeat(np.arange(8, dtype=np.int32), len(batch.input_ids))
    many = replace(many, input_ids=(many.input_ids + copies) % VOCAB)  # equal samples would be scored once
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen2"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine.score(many, lambda tokens: None)
    used = torch.cuda.max_memory_allocated() - before
    engine.close()
    full = len(many.input_ids) * model.config.vocab_size * 4
    print(f"peak {used / 2**20:.0f} MiB, full logits {full / 2**20:.0f} MiB")
    assert used < full / 3
