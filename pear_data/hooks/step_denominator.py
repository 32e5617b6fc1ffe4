"""What a step of a transformers Trainer is divided by, over its micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pear_data.loss.normaliser import Normaliser, denominator


def step_denominator(
    trainer: Any, batches: Sequence[Mapping[str, Any]], normaliser: Normaliser, device: torch.device
) -> Tensor | float:
    """The denominator of a step whose micro-batches on this rank are `batches`; float32 scalar, or the given number.

    Every rank calls this. Ranks that tensor parallelism gives the same batch count once.
    """
    if not isinstance(normaliser, str):
        return normaliser
    local = torch.stack([denominator(batch, normaliser) for batch in batches]).sum()
    total: Tensor = trainer.accelerator.gather(local.to(device)).sum()
    copies: int = trainer.get_tp_size()
    return total / copies


def refuse_split_sequences(parallelism: Any) -> None:
    """Raises ValueError for an accelerate `ParallelismConfig` that gives a device a part of a sequence."""
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "context and sequence parallelism split a sequence over devices, and its weights would stay whole: "
            "set cp_size and sp_size to 1"
        )
