"""What `vllm.LLM` is given: what scoring decides, over it what the user passes on, and the memory the path leaves."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

from pear_data.engines.checkpoint import NO_LIMIT, rope_switch
from pear_data.engines.dtypes import resolve_dtype
from pear_data.engines.vllm_paths import ScoringPath
from pear_data.engines.vllm_prefixes import MAX_TARGETS
from pear_data.errors import UsageError

EngineArgs = Mapping[str, Any]
Scalar = str | int | float | bool | None
_MAX_SEQUENCES = 256
FIXED = {
    "load_format": "safetensors",
    "skip_tokenizer_init": True,
    "max_logprobs": MAX_TARGETS,
    # Prompts only: graphs and compilation pay for decoding.
    "enforce_eager": True,
    "use_tqdm_on_load": False,
}
_NO_TOKENIZER = "token ids are scored, vLLM gets no tokenizer"
_SAFETENSORS = "weights are read, and identified, from the model's own safetensors files"
_SCORING = "scoring sets it: other values give other numbers or none"
_ADAPTER = "merge the adapter into the model and give that"
_REFUSED = {
    "model": "--model sets it",
    "revision": "--revision sets it",
    "dtype": "--dtype sets it",
    "max_model_len": "--max-length sets it",
    "trust_remote_code": "--trust-remote-code sets it",
    "tensor_parallel_size": "--tensor-parallel sets it",
    "hf_token": "set HF_TOKEN in the environment: engine arguments are stored with the scores",
    **dict.fromkeys(
        ("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"), _NO_TOKENIZER
    ),
    **dict.fromkeys(("load_format", "model_weights", "hf_config_path", "ignore_patterns"), _SAFETENSORS),
    **dict.fromkeys(("enable_lora", "default_mm_loras"), _ADAPTER),
    **dict.fromkeys(
        (
            "runner",
            "convert",
            "pooler_config",
            "logprobs_mode",
            "max_logprobs",
            "logits_processors",
            "speculative_config",
            "spec_method",
            "spec_model",
            "spec_tokens",
            "diffusion_config",
            "watermark_config",
            "enable_prompt_embeds",
            "return_sampling_mask",
            "kv_sharing_fast_prefill",
        ),
        _SCORING,
    ),
}


def check_engine_args(given: EngineArgs) -> None:
    """Raise UsageError for an argument the installed vLLM lacks or scoring decides itself. Imports vLLM."""
    from vllm import EngineArgs as VllmArguments

    known = [field.name for field in dataclasses.fields(VllmArguments) if not field.name.startswith("_")]
    for key in given:
        if key.startswith("data_parallel"):
            raise UsageError(f"--engine-arg {key}: --workers N runs an engine on each of N GPUs")
        if key in _REFUSED:
            raise UsageError(f"--engine-arg {key}: {_REFUSED[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}?" if near else "see `vllm serve --help=all`"
            raise UsageError(f"--engine-arg {key}: the installed vLLM has no such argument; {hint}")


def recorded(given: EngineArgs) -> dict[str, Scalar]:
    """Engine arguments for an identity: `engine_arg.KEY`, lists and mappings as JSON text."""
    return {
        f"engine_arg.{key}": value
        if isinstance(value, Scalar)
        else json.dumps(value, sort_keys=True, default=str)
        for key, value in given.items()
    }


def with_head_dtype(given: EngineArgs, head_dtype: str) -> dict[str, Any]:
    """`given` with the precision of the output head in `hf_overrides`.

    Raises UsageError for another precision than "model" or "float32", and where vLLM does not let it be chosen.
    """
    overrides = given.get("hf_overrides") or {}
    if not isinstance(overrides, Mapping):
        raise UsageError('--engine-arg hf_overrides: give a mapping, as in hf_overrides={"rope_theta": 1e6}')
    if "head_dtype" in overrides:
        raise UsageError("--engine-arg hf_overrides: --head-dtype sets head_dtype")
    if head_dtype == "model":
        return dict(given)
    if head_dtype != "float32":
        raise UsageError(f"--head-dtype {head_dtype}: choose model or float32")
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    if "head_dtype" not in LogitsProcessor.__init__.__code__.co_names:
        raise UsageError(
            "--head-dtype float32: the installed vLLM runs the head in the model's precision only"
        )
    return {**given, "hf_overrides": {**overrides, "head_dtype": "float32"}}


def model_dtype(requested: str, device: str, config: Any, given: EngineArgs) -> str:
    """The `dtype` to ask for: the kernels of a quantised model decide on theirs, and few take float32."""
    stored = getattr(config, "quantization_config", None)
    quantised = stored or given.get("quantization") or given.get("quantization_config")
    resolved = resolve_dtype(requested, device)
    return "auto" if requested == "auto" and quantised else resolved


def check_rope(config: Any, max_length: int, model: str) -> None:
    """Raise UsageError where vLLM would rotate short samples otherwise than transformers does.

    Long RoPE has one set of factors for samples up to the original length and another for longer ones. vLLM takes one
    of them for all samples, by `max_model_len`; a tiny model's log-probs were seen to differ by 6.
    """
    switch = rope_switch(config)
    if switch is not None and max_length >= switch:
        raise UsageError(
            f"{model}: with samples of {switch} tokens or more vLLM applies the long RoPE factors to short ones "
            f"too; give --max-length {switch - 1} or --engine transformers"
        )


def max_model_len(max_length: int) -> int | None:
    """One more than a sample has: vLLM insists on room for a token it never has to process."""
    return None if max_length == NO_LIMIT else max_length + 1


def memory_arguments(path: ScoringPath, vocab_size: int, given: EngineArgs, device: str) -> dict[str, Any]:
    """`given`, and unless it says otherwise the size of a step and a GPU's memory less room for the step's logits.

    Raises UsageError for a step that is no number of tokens.
    """
    tokens = given.get("max_num_batched_tokens", path.step_tokens(vocab_size))
    if not isinstance(tokens, int):
        raise UsageError(f"--engine-arg max_num_batched_tokens: {tokens!r} is no whole number")
    arguments = {"max_num_batched_tokens": tokens, "max_num_seqs": min(_MAX_SEQUENCES, tokens)}
    if device == "cuda":
        from vllm import EngineArgs as VllmArguments
        from vllm.platforms import current_platform

        share = path.logits_bytes(vocab_size) / current_platform.get_device_total_memory()
        arguments["gpu_memory_utilization"] = round(VllmArguments.gpu_memory_utilization - share, 4)
    return {**arguments, **given}


def environment(config: Any, max_length: int, device: str, given: EngineArgs) -> dict[str, str]:
    """The variables for vLLM to read."""
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # for the one more; `resolve_max_length` holds the real limit
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit threads and locks of this process
    }
    if device == "cpu":
        variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if "kv_cache_memory_bytes" not in given:
            variables["VLLM_CPU_KVCACHE_SPACE"] = str(_kv_cache_gib(config, max_length))
    return variables


def _kv_cache_gib(config: Any, max_length: int) -> int:
    """GiB that hold the keys and values of one longest sample in float32, at least 1."""
    text = config.get_text_config()
    heads: int = getattr(text, "num_attention_heads", 0)
    if heads == 0 or max_length == NO_LIMIT:
        return 1
    head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // heads
    cached_heads: int = getattr(text, "num_key_value_heads", None) or heads
    needed: int = 8 * text.num_hidden_layers * cached_heads * head_dim * max_length
    return max(1, math.ceil(needed * 1.1 / 2**30))
