"""The transformers Trainer on an export, where `attach` alone is not enough.

    PearTrainer      a Trainer that divides a whole step by what its model is attached with

With `attach(model)` the plain Trainer divides by the labels of the step, as it counts them. The sum of weights and the
number of sequences it does not count: that is all this adds, and refusals of what would lose or bypass a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from pear_data.hooks.step_denominator import refuse_split_sequences, step_denominator
from pear_data.loss import PearCollator
from pear_data.loss.attachment import attached_loss
from pear_data.loss.collator import PACKED, TOKEN_COLUMNS, WEIGHTS

_REFUSED_SETTINGS = {
    "average_tokens_across_devices": (True, "each rank would divide by its own labels"),
    "label_smoothing_factor": (0, "a weight multiplies the loss of one token, which smoothing spreads"),
}


class PearTrainer(Trainer):  # type: ignore[misc]  # transformers is not checked
    """A Trainer for `model=attach(model, normaliser=...)`: its denominator over the micro-batches and ranks of a step.

    `data_collator` is a PearCollator; its columns stay in the dataset whatever `remove_unused_columns` says, streams
    come undispatched, and models that would not take a token count get one. Evaluation is divided by its labels always.

    Raises ValueError for a model that is not attached, another collator, a training batch without weights, and for what
    would lose or bypass a weight: label smoothing, `compute_loss_func`, sequences split over devices, one process with
    several GPUs under a fused loss, and metrics that need the logits which a fused loss does not make.
    """

    def __init__(self, model: Any, args: TrainingArguments, **kwargs: Any) -> None:
        loss = attached_loss(model)
        if loss is None:
            raise ValueError("the model is not attached: PearTrainer(attach(model), ...)")
        _refuse(args, kwargs, loss.settings.fused)
        if args.accelerator_config.dispatch_batches is None:
            # Dispatching, accelerate's way with streams, cannot join batches that are not of tensors alone.
            args.accelerator_config.dispatch_batches = False
        super().__init__(model, args, **kwargs)
        refuse_split_sequences(self.accelerator.parallelism_config)
        # The attached loss divides by the Trainer's count, whether or not the model's own would.
        self.model_accepts_loss_kwargs = True
        self._normaliser = loss.settings.normaliser
        self._denominator: Tensor | float | None = None

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*TOKEN_COLUMNS, PACKED, "sample_id", "sample_ids"]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """The micro-batches of a training step, and their labels, which scale the loss over ranks."""
        batches, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        if any(WEIGHTS not in batch for batch in batches):
            raise ValueError("a training batch has no loss_weights: train on an export of `pear-data export`")
        if self._normaliser == "tokens" or not batches:
            self._denominator = labels
        else:
            self._denominator = step_denominator(self, batches, self._normaliser, device)
        return batches, labels

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        if self.model.training:
            inputs = {**inputs, "loss_denominator": self._denominator}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def _refuse(args: TrainingArguments, arguments: Mapping[str, Any], fused: bool) -> None:
    for name, (harmless, reason) in _REFUSED_SETTINGS.items():
        value = getattr(args, name)
        if value != harmless:
            raise ValueError(f"TrainingArguments({name}={value!r}) does not go with loss_weights: {reason}")
    if not isinstance(arguments.get("data_collator"), PearCollator):
        raise ValueError("PearTrainer needs data_collator=PearCollator(...): others lose the weights")
    if arguments.get("compute_loss_func") is not None:
        raise ValueError("PearTrainer takes no compute_loss_func: it computes the weighted loss itself")
    if fused and args.n_gpu > 1:
        raise ValueError(
            "a fused loss does not go with one process for several GPUs: start one a GPU, with torchrun"
        )
    if fused and any(arguments.get(name) for name in ("compute_metrics", "preprocess_logits_for_metrics")):
        raise ValueError(
            "a fused loss makes no logits for metrics: attach with fused=False, or leave them out"
        )
