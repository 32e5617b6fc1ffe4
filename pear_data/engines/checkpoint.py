"""What a model directory or hub name says about itself, before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pear_data.errors import PearError, UsageError

NO_LIMIT = 2**31 - 1  # max_length of a model that has no positions to run out of


def load_config(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The configuration of the causal language model `model` (a local directory or a hub name).

    Raises PearError where there is none, where the hub cannot be reached, or where it is another kind of model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    looks_local = model.startswith((".", "~", os.sep)) or model.count("/") > 1
    if looks_local and not os.path.isdir(model):
        raise PearError(
            f"{model}: no such model directory; give a directory with a config.json or a hub name"
        )
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise unloadable(model, error) from error
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not has_own_code:
        raise PearError(
            f"{model}: a {config.model_type} model is not a causal language model; name one that is"
        )
    return config


def unloadable(model: str, error: Exception) -> PearError:
    """What a loader raised, as one line naming the model."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return PearError(f"cannot load the model {model}: {reason}")


def resolve_max_length(config: Any, requested: int | None, model: str) -> int:
    """Tokens of the longest sample: what was asked for, at most the positions the model was made for.

    Raises UsageError where more is asked for.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT
    if requested is not None and requested > positions:
        raise UsageError(
            f"--max-length {requested}: {model} has {positions} positions; give at most that many"
        )
    return requested or positions


def rope_switch(config: Any) -> int | None:
    """Tokens beyond which positions are encoded in another way (LongRoPE); None where length is no matter."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    return int(parameters["original_max_position_embeddings"])


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """No bar of transformers' over the loading of weights: the command shows its own progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
