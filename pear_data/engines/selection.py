"""Which engine scores: the one asked for, or vLLM where a GPU would keep it busy."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from pear_data.engines.base import Engine
from pear_data.errors import UsageError


def open_engine(name: str, model: str, **options: Any) -> tuple[Engine, str]:
    """An engine with `model` loaded, and one sentence saying which and why.

    `name` is "auto", "transformers" or "vllm"; `options` go to the engine (`revision`, `dtype`, `max_length`,
    `trust_remote_code`).

    Raises UsageError where vLLM is asked for and not installed, PearError where the model cannot be loaded.
    """
    chosen, reason = choose_engine(name)
    if chosen == "vllm":
        from pear_data.engines.vllm_engine import VllmEngine

        return VllmEngine(model, **options), reason
    from pear_data.engines.transformers_engine import TransformersEngine

    return TransformersEngine(model, **options), reason


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
