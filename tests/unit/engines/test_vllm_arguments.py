"""What `vllm.LLM` is given, checked against the fields of the vLLM that is installed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, MambaConfig, Phi3Config
from vllm import EngineArgs

from pear_data.engines import vllm_arguments
from pear_data.engines.checkpoint import NO_LIMIT
from pear_data.engines.vllm_arguments import (
    check_engine_args,
    check_rope,
    environment,
    max_model_len,
    memory_arguments,
    model_dtype,
    with_head_dtype,
)
from pear_data.engines.vllm_paths import LOGITS_BYTES, Classic, Targets
from pear_data.errors import UsageError

CONFIG = LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("max_model_len", "--engine-arg max_model_len: --max-length sets it"),
        ("data_parallel_size", "--engine-arg data_parallel_size: --workers N"),
        ("hf_token", "set HF_TOKEN in the environment"),
        ("gpu_memory_utilisation", "no such argument; did you mean gpu_memory_utilization"),
        ("gpu_mem", "did you mean .*gpu_memory_utilization"),
        ("_api_process_rank", "no such argument"),
        ("zzz", "no such argument; see `vllm serve --help=all`"),
    ],
)
def test_arguments_that_are_refused(key: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_engine_args({"enforce_eager": False, key: 1})


def test_refused_names_are_vllms() -> None:
    """A name vLLM changes must not slip through."""
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert set(vllm_arguments._REFUSED) <= known
    assert set(vllm_arguments.FIXED) <= known


def test_arguments_that_pass() -> None:
    check_engine_args(
        {"gpu_memory_utilization": 0.5, "quantization": "fp8", "kv_cache_dtype": "fp8", "seed": 1}
    )


def test_head_dtype_joins_the_overrides() -> None:
    given = {"hf_overrides": {"rope_theta": 1e6}}
    assert with_head_dtype(given, "model") == given
    joined = {"hf_overrides": {"rope_theta": 1e6, "head_dtype": "float32"}}
    assert with_head_dtype(given, "float32") == joined
    assert with_head_dtype({}, "float32") == {"hf_overrides": {"head_dtype": "float32"}}


@pytest.mark.parametrize(
    ("given", "head_dtype", "message"),
    [
        ({}, "bfloat16", "--head-dtype bfloat16: choose model or float32"),
        ({"hf_overrides": {"head_dtype": "float32"}}, "model", "--head-dtype sets head_dtype"),
        ({"hf_overrides": "x"}, "model", "hf_overrides: give a mapping"),
    ],
)
def test_head_dtypes_that_are_refused(given: dict[str, Any], head_dtype: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_head_dtype(given, head_dtype)


def test_a_vllm_whose_head_has_the_models_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import logits_processor

    class Old:
        def __init__(self) -> None: ...

    monkeypatch.setattr(logits_processor, "LogitsProcessor", Old)
    with pytest.raises(UsageError, match="runs the head in the model's precision only"):
        with_head_dtype({}, "float32")


@pytest.mark.parametrize(
    ("vocab_size", "tokens"), [(32_000, 5504), (151_936, 1152), (256_000, 640), (10**8, 128)]
)
def test_a_classic_step_is_bounded_by_its_logits(vocab_size: int, tokens: int) -> None:
    arguments = memory_arguments(Classic(), vocab_size, {}, "cpu")
    assert arguments == {"max_num_batched_tokens": tokens, "max_num_seqs": min(256, tokens)}
    assert Classic().logits_bytes(vocab_size) <= LOGITS_BYTES or tokens == 128


def test_steps_of_a_small_vocabulary_and_of_targets() -> None:
    assert memory_arguments(Classic(), 3000, {}, "cpu")["max_num_batched_tokens"] == 8192
    assert memory_arguments(Targets(), 256_000, {}, "cpu")["max_num_batched_tokens"] == 8192
    assert memory_arguments(Targets(), 256_000, {"max_num_batched_tokens": 64}, "cpu")["max_num_seqs"] == 64


def test_a_step_that_is_no_number() -> None:
    with pytest.raises(UsageError, match="max_num_batched_tokens: '8k' is no whole number"):
        memory_arguments(Targets(), 3000, {"max_num_batched_tokens": "8k"}, "cpu")


def test_room_for_the_logits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(get_device_total_memory=lambda: 24 * 2**30)
    monkeypatch.setattr("vllm.platforms.current_platform", memory)
    own = EngineArgs.gpu_memory_utilization
    share = memory_arguments(Classic(), 151_936, {}, "cuda")["gpu_memory_utilization"]
    assert own - 2 / 24 - 0.001 <= share < own - 1.9 / 24
    given = {"gpu_memory_utilization": 0.5}
    assert memory_arguments(Classic(), 151_936, given, "cuda")["gpu_memory_utilization"] == 0.5


def test_dtype_of_quantised_models_is_left_to_vllm() -> None:
    quantised = SimpleNamespace(quantization_config={"quant_method": "gptq"})
    assert model_dtype("auto", "cuda", quantised, {}) == "auto"
    assert model_dtype("float16", "cuda", quantised, {}) == "float16"
    assert model_dtype("auto", "cuda", SimpleNamespace(), {"quantization": "fp8"}) == "auto"
    assert model_dtype("auto", "cpu", SimpleNamespace(), {}) == "float32"
    with pytest.raises(UsageError, match="--dtype int8"):
        model_dtype("int8", "cpu", quantised, {})


def test_long_rope_of_samples_on_both_sides_of_the_original_length() -> None:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    phi = Phi3Config(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=1024,
        original_max_position_embeddings=256,
        rope_parameters={**factors, "rope_theta": 1e4},
    )
    check_rope(phi, 255, "phi")
    for max_length in (256, 1024):
        with pytest.raises(UsageError, match="phi: .* give --max-length 255 or --engine transformers"):
            check_rope(phi, max_length, "phi")
    check_rope(CONFIG, 4096, "llama")
    check_rope(MambaConfig(), NO_LIMIT, "mamba")


def test_max_model_len() -> None:
    assert (max_model_len(64), max_model_len(NO_LIMIT)) == (65, None)


def test_cpu_memory_holds_one_longest_sample() -> None:
    """32 layers x 8 heads x 128 x 4 bytes, keys and values: 256 KiB per token, a tenth on top."""
    assert environment(CONFIG, 32_768, "cpu", {})["VLLM_CPU_KVCACHE_SPACE"] == "9"
    assert environment(CONFIG, NO_LIMIT, "cpu", {})["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment(MambaConfig(), 4096, "cpu", {})["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(CONFIG, 64, "cpu", {"kv_cache_memory_bytes": 2**30})
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(CONFIG, 64, "cuda", {})
