"""A batch at the index of its logits, and its live weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pear_data.loss.alignment import IGNORE_INDEX, next_token, shape_of
from pear_data.loss.live import LivePear, LiveWeightsOfRows
from pear_data.loss.nll import token_logprobs, weighted_nll


@dataclass(frozen=True, slots=True)
class LossBatch:
    """[B, L] each, at the index of the logits that predict a token; `targets` are -100 where nothing is scored."""

    targets: Tensor
    weights: Tensor | None
    behavior: Tensor | None
    sequence_ids: Tensor | None

    @classmethod
    def at_logits(
        cls, targets: Tensor, columns: Mapping[str, Tensor | None], device: torch.device
    ) -> LossBatch:
        """`targets` shifted already, `columns` (weights, behavior log-probs, sequence ids) at their tokens' index.

        Raises ValueError for columns of another shape.
        """
        for name, column in columns.items():
            if column is not None and column.shape != targets.shape:
                raise ValueError(
                    f"{name} {shape_of(column)} and labels {shape_of(targets)} must have one shape: "
                    "batch them together, with PearCollator"
                )
        shifted = [None if one is None else next_token(one.to(device), 0) for one in columns.values()]
        return cls(targets.to(device), *shifted)

    @property
    def scored(self) -> Tensor:
        return self.targets != IGNORE_INDEX

    @property
    def negative(self) -> Tensor | None:
        # Only the tokens of samples marked negative have frozen weights below 0.
        return None if self.weights is None else self.weights < 0

    def labels(self) -> Tensor:
        """Their number; 1 where there are none."""
        return self.scored.sum().clamp(min=1)

    def live_weights(self, live: LivePear, logprobs: Tensor) -> Tensor:
        behavior = self._require_behavior()
        return live.weights(logprobs, behavior, self.scored, self.sequence_ids, self.negative)

    def live_weights_of_rows(self, live: LivePear, negatives: bool) -> LiveWeightsOfRows:
        """Without `negatives` as for samples that are not negative."""
        negative = self.negative if negatives else None
        return LiveWeightsOfRows(live, self._require_behavior(), self.scored, self.sequence_ids, negative)

    def of_negatives(self, negative: bool) -> LossBatch:
        """With the targets of samples marked negative, or of the others, alone; sequences do not rest on each other."""
        if self.negative is None:
            return self
        return replace(self, targets=self.targets.masked_fill(self.negative ^ negative, IGNORE_INDEX))

    def _require_behavior(self) -> Tensor:
        if self.behavior is None:
            raise ValueError(
                "the batch has no behavior_logprobs: export with --live, and batch with PearCollator"
            )
        if self.behavior.element_size() < 4:
            raise ValueError(
                f"behavior_logprobs came as {self.behavior.dtype}, too coarse for the log-ratio's clips: set "
                "cast_forward_inputs=False where FSDP casts a batch, and no 16-bit DeepSpeed"
            )
        return self.behavior


def loss_from_logits(
    logits: Tensor, batch: LossBatch, vocab_size: int, live: LivePear, denom: Tensor | float
) -> Tensor:
    """By live weights; `causal_loss` is the same by frozen ones."""
    logprobs = token_logprobs(logits, batch.targets, vocab_size)
    return weighted_nll(logprobs, batch.live_weights(live, logprobs), batch.scored, denom=denom)
