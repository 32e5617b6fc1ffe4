"""Where things of a batch stand: labels against the logits that predict them, sequences within rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


def next_token(values: Tensor, fill: float) -> Tensor:
    """Move values [B, L] from their token's own index to the index of the logits that predict it."""
    return F.pad(values, (0, 1), value=fill)[..., 1:]


def sequence_ids_from_positions(position_ids: Tensor) -> Tensor:
    """Ids [B, L] that grow where `position_ids` [B, L] of a pack start again at 0."""
    return (position_ids == 0).cumsum(-1)


def sequence_ids(batch: Mapping[str, Any]) -> Tensor | None:
    """[B, L], other ids for other sequences of a row, from `seq_idx` or `position_ids`; None: a row is a sequence."""
    if batch.get("seq_idx") is not None:
        ids: Tensor = batch["seq_idx"]
        return ids
    positions = batch.get("position_ids")
    return None if positions is None or positions.dim() != 2 else sequence_ids_from_positions(positions)


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
