"""What the weighted sum of a step is divided by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pear_data.loss.alignment import IGNORE_INDEX, sequence_ids

Normaliser = Literal["tokens", "weights", "sequences"] | float
_COUNTED = ("tokens", "weights", "sequences")


def require_normaliser(normaliser: Normaliser, live: object) -> None:
    """Raises ValueError for one that does not exist, or is not known in time."""
    if isinstance(normaliser, str):
        if normaliser not in _COUNTED:
            raise ValueError(f"normaliser is {normaliser!r}: {', '.join(_COUNTED)}, or a number")
        if normaliser == "weights" and live is not None:
            raise ValueError(
                "live weights are not known before the step: take another normaliser than weights"
            )
    elif not normaliser > 0:
        raise ValueError(f"normaliser is {normaliser}: a number must be above 0")


def denominator(batch: Mapping[str, Any], normaliser: Normaliser = "tokens") -> Tensor:
    """A batch's part of what its step is divided by: float32 scalar, to be summed over micro-batches and ranks.

    "tokens" counts the labels, "weights" sums `loss_weights` (their absolute scale then cancels), "sequences" counts
    the sequences that have labels, in packs too. `batch` is one of PearCollator's, padded or padding-free.

    Raises ValueError for another normaliser: a number is no sum of parts, it is the denominator itself.
    """
    if not isinstance(normaliser, str) or normaliser not in _COUNTED:
        raise ValueError(f"normaliser is {normaliser!r}: {', '.join(_COUNTED)}; a number divides as it is")
    # Nothing predicts the first token.
    scored: Tensor = batch["labels"][:, 1:] != IGNORE_INDEX
    if normaliser == "tokens":
        return scored.sum().float()
    if normaliser == "weights":
        weights: Tensor = batch["loss_weights"]
        return weights[:, 1:].float().masked_fill(~scored, 0.0).sum()
    ids = sequence_ids(batch)
    return count_sequences(scored, None if ids is None else ids[:, 1:])


def count_sequences(scored: Tensor, ids: Tensor | None) -> Tensor:
    """How many sequences of `scored` [B, L] have a true entry; a row is one, or as many as it has `ids` [B, L]."""
    if ids is None:
        return scored.any(1).sum().float()
    found = torch.zeros(scored.size(0), scored.size(1) + 2, device=scored.device)
    return found.scatter_reduce(1, ids.long(), scored.float(), "amax").sum()
