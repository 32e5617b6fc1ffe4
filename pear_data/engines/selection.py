"""Which engine scores: the one asked for, or vLLM where a GPU would keep it busy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import yaml

from pear_data.engines.base import Engine
from pear_data.errors import UsageError
from pear_data.redaction import secret_in


def open_engine(
    name: str,
    model: str,
    *,
    head_dtype: str = "model",
    tensor_parallel: int = 1,
    engine_args: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Engine, str]:
    """An engine with `model` loaded, and a sentence or two saying which, why, and what is slow about it.

    `name` is "auto", "transformers" or "vllm"; `options` go to the engine (`revision`, `dtype`, `max_length`,
    `trust_remote_code`), what stands before them to vLLM alone. transformers' head is float32 in any case.

    Raises UsageError where vLLM is asked for and not installed, or has an option that is only vLLM's and does not
    score; PearError where the model cannot be loaded.
    """
    chosen, reason = choose_engine(name)
    if chosen == "vllm":
        from pear_data.engines.vllm_engine import VllmEngine

        vllm = VllmEngine(
            model,
            head_dtype=head_dtype,
            tensor_parallel=tensor_parallel,
            engine_args=engine_args or {},
            **options,
        )
        return vllm, reason
    for flag, given in (("--tensor-parallel", tensor_parallel > 1), ("--engine-arg", bool(engine_args))):
        if given:
            raise UsageError(f"{flag} is vLLM's alone, and: {reason} Leave it out, or give --engine vllm")
    from pear_data.engines.transformers_engine import TransformersEngine

    engine = TransformersEngine(model, **options)
    return engine, f"{reason} {engine.remark}".strip()


def engine_arguments(given: Sequence[str]) -> dict[str, Any]:
    """`--engine-arg KEY=VALUE`s as keyword arguments, each value read as YAML.

    Raises UsageError for one without '=', with an unreadable value, with a key given before, or that holds a secret.
    """
    found: dict[str, Any] = {}
    for argument in given:
        key, equals, text = argument.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise UsageError(f"--engine-arg {argument}: give KEY=VALUE, such as gpu_memory_utilization=0.8")
        if key in found:
            raise UsageError(f"--engine-arg {argument}: {key} is given twice")
        try:
            found[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UsageError(f"--engine-arg {argument}: the value is no YAML; put it in quotes") from None
        if secret := secret_in(key, found[key]):
            raise UsageError(
                f"--engine-arg {secret}: this is a secret, and engine arguments are stored with the scores; "
                "set HF_TOKEN in the environment, or whatever else names it there"
            )
    return found


def choose_engine(name: str) -> tuple[str, str]:
    """The rule behind `--engine`: ("transformers" or "vllm", the sentence that says why)."""
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UsageError("--engine vllm: vLLM is not installed; run: pip install 'pear-data[vllm]'")
    if name in ("transformers", "vllm"):
        return name, f"Scoring with {name}, as asked."
    if name != "auto":
        raise UsageError(f"--engine {name}: choose auto, transformers or vllm")
    if not installed:
        return (
            "transformers",
            "Scoring with transformers: vLLM is not installed (pip install 'pear-data[vllm]').",
        )

    import torch

    if not torch.cuda.is_available():
        return "transformers", "Scoring with transformers: no GPU is visible."
    return "vllm", "Scoring with vllm: it is installed and a GPU is visible."
