"""The loss function that an attached model calls, and the hooks around its forward."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pear_data.loss.alignment import IGNORE_INDEX, next_token, sequence_ids
from pear_data.loss.batch_loss import LossBatch, loss_from_logits
from pear_data.loss.deferred_head import DeferredHead, DeferredLogits
from pear_data.loss.live import LivePear
from pear_data.loss.nll import causal_loss
from pear_data.loss.normaliser import Normaliser, count_sequences, require_normaliser


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What `attach` was asked for. Raises ValueError for what does not go together."""

    fused: bool = False
    backend: str = "ours"
    live: LivePear | None = None
    normaliser: Normaliser = "tokens"

    def __post_init__(self) -> None:
        if self.backend != "ours" and not self.fused:
            raise ValueError(f"backend {self.backend!r} is one of the fused loss: attach with fused=True")
        require_normaliser(self.normaliser, self.live)


class WeightedLoss:
    """Installed as `model.loss_function`: one object a model, in the signature of transformers' `ForCausalLMLoss`."""

    def __init__(self, settings: LossSettings, head: DeferredHead | None) -> None:
        """`head`, the model's own, for settings that are fused."""
        self.settings = settings
        self.head = head
        self.weights_arrived = False
        self._sequence_ids: Tensor | None = None

    def __call__(
        self,
        logits: Tensor | DeferredLogits,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        behavior_logprobs: Tensor | None = None,
        loss_denominator: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        self._note_weights(loss_weights)
        if kwargs.get("label_smoothing") or ignore_index != IGNORE_INDEX:
            raise ValueError(
                "loss_weights do not go with label smoothing, nor with labels ignored by another number than -100"
            )
        if shift_labels is None:
            if labels is None:
                raise ValueError("the loss got neither labels nor shift_labels: put `labels` into the batch")
            shift_labels = next_token(labels, IGNORE_INDEX)
        columns = {
            "loss_weights": loss_weights,
            "behavior_logprobs": behavior_logprobs,
            "seq_idx": self._sequence_ids,
        }
        device = (logits.hidden if isinstance(logits, DeferredLogits) else logits).device
        batch = LossBatch.at_logits(shift_labels, columns, device)
        denom = self._denominator(batch, loss_denominator, num_items_in_batch)
        live = self.settings.live
        if isinstance(logits, DeferredLogits):
            from pear_data.loss.batch_loss_fused import loss_from_hidden

            counted = batch.labels() if denom is None else denom
            return loss_from_hidden(logits, batch, live, counted, self.settings.backend)
        if self.head is not None:
            raise RuntimeError(
                "the model is attached with fused=True, but its logits were computed: give labels by keyword, and "
                "replace or wrap the output head before attaching"
            )
        vocab_size = vocab_size or logits.size(-1)
        if loss_weights is None or live is None:
            return causal_loss(
                logits, labels, vocab_size, denom, shift_labels=shift_labels, loss_weights=loss_weights
            )
        return loss_from_logits(logits, batch, vocab_size, live, batch.labels() if denom is None else denom)

    def before_forward(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the causal LM: what its forward does not hand on, and whether it will need logits."""
        self._sequence_ids = sequence_ids(kwargs)
        if self.head is not None:
            self.head.deferring = kwargs.get("labels") is not None

    def after_forward(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the causal LM: logits that were not computed are None."""
        self._sequence_ids = None
        if self.head is not None:
            self.head.deferring = False
        if isinstance(output, tuple):
            return tuple(None if isinstance(part, DeferredLogits) else part for part in output)
        if isinstance(getattr(output, "logits", None), DeferredLogits):
            return type(output)(**{name: part for name, part in output.items() if name != "logits"})
        return output

    def require_arrival(
        self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], _output: object
    ) -> None:
        """Forward hook. Once weights have arrived it stays silent: the path of a model does not change by the step."""
        if kwargs.get("loss_weights") is not None and not self.weights_arrived:
            raise RuntimeError(
                "the batch has loss_weights, but the loss was computed without them: switch off what bypasses "
                "model.loss_function (label smoothing, compute_loss_func, a fused or patched head such as Liger's)"
            )

    def _note_weights(self, loss_weights: Tensor | None) -> None:
        if loss_weights is not None:
            self.weights_arrived = True
        elif torch.is_grad_enabled():
            warnings.warn(
                "this training step is unweighted: the batch has no loss_weights (use PearCollator and "
                "remove_unused_columns=False)",
                stacklevel=3,
            )

    def _denominator(
        self, batch: LossBatch, loss_denominator: Tensor | float | None, num_items: Tensor | int | None
    ) -> Tensor | float | None:
        """What to divide by; None for the labels of this very batch. Evaluation is divided by its labels always."""
        normaliser = self.settings.normaliser
        if loss_denominator is not None:
            return loss_denominator
        if not torch.is_grad_enabled() or normaliser == "tokens":
            return num_items
        if not isinstance(normaliser, str):
            return normaliser
        if num_items is not None:
            raise ValueError(
                f"the model is attached with normaliser={normaliser!r}, but the Trainer counts the labels of a step: "
                "train with pear_data.hooks.transformers.PearTrainer, or give loss_denominator"
            )
        if normaliser == "sequences":
            return count_sequences(batch.scored, batch.sequence_ids).clamp(min=1)
        if batch.weights is None:
            raise ValueError("the batch has no loss_weights to divide by: use PearCollator")
        return batch.weights.float().masked_fill(~batch.scored, 0.0).sum()
