"""TRL's SFTTrainer on an export: its own forward, fused head, metrics and auxiliary loss, with a weight per token.

    make_sft_trainer(model, args, train_dataset, ...)     an SFTTrainer that minimises sum(weight * nll) / N
    PearSFTTrainer                                        the class underneath

TRL takes the log-prob of every label from its head and adds them up. Here each is multiplied by its weight in between,
so all around the sum (entropy, mean_token_accuracy, num_tokens, the load-balancing loss of mixtures of experts,
gradient accumulation, data parallelism) remains TRL's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import FusedCausalLMOutput, global_then_local_main_first

from pear_data.hooks.step_denominator import refuse_split_sequences, step_denominator
from pear_data.hooks.trl_rows import refusing_longer_rows, require_columns, require_padding_free
from pear_data.loss import LivePear, PearCollator
from pear_data.loss.alignment import IGNORE_INDEX
from pear_data.loss.collator import BEHAVIOR, PACKED, TOKEN_COLUMNS, WEIGHTS
from pear_data.loss.normaliser import Normaliser, require_normaliser

_REFUSED_SETTINGS = {
    "assistant_only_loss": ((False,), "the export's labels say what is scored"),
    "average_tokens_across_devices": ((True,), "each rank would divide by its own labels"),
    "completion_only_loss": ((None, False), "the export's labels say what is scored"),
    "label_smoothing_factor": ((0,), "a weight multiplies the loss of one token, which smoothing spreads"),
    "loss_type": (("nll",), "for DFT, export the weights of `pear-data weight --level dft`"),
    "packing_strategy": (("bfd", "bfd_split"), "it cuts samples, and what follows a cut loses its context"),
}
_REFUSED_ARGUMENTS = {
    "data_collator": "its own collator carries the weights",
    "compute_loss_func": "it computes the weighted loss itself",
    "formatting_func": "the rows of an export are tokens already",
}


def make_sft_trainer(
    model: Any,
    args: SFTConfig,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Any = None,
    *,
    live: LivePear | None = None,
    normaliser: Normaliser = "tokens",
    fused_head: bool = True,
    **kwargs: Any,
) -> PearSFTTrainer:
    """An SFTTrainer that minimises sum(weight * nll) / N, N the labels of the whole step over micro-batches and ranks.

    `train_dataset` holds rows of `pear-data export --format hf` or `hf-packed`, as `datasets.load_dataset` gives them,
    whole or streamed. `hf` rows are padded; with `SFTConfig(padding_free=True, max_length=None)` laid end to end; with
    `packing=True` packed by TRL to `max_length`. `hf-packed` rows take `padding_free=True, max_length=None`.
    `eval_dataset` (one, or a dict of them) is weighted where it has `loss_weights` and plain where it has not. `model`
    and `kwargs` are SFTTrainer's. Of the tokenizer only the padding token is used.

    `live` takes the weights from the trained model's own log-probs and the export's `behavior_logprobs` (`export
    --live`), in place of `loss_weights`. `normaliser` puts the sum of the frozen weights ("weights": the absolute scale
    cancels), the sequences that have labels ("sequences") or a number of your own in N's place; a batch of evaluation
    is divided by its labels always. `fused_head=False` takes the log-probs from all logits at once instead of from
    TRL's fused head, for models whose head does more than TRL's knows of.

    Raises ValueError for what would lose or bypass a weight: missing columns, rows longer than `max_length` (TRL cuts
    ids and labels, not weights), packs to be packed or padded again, other losses and collators than these, and
    sequences split over devices.
    """
    return PearSFTTrainer(
        model,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        live=live,
        normaliser=normaliser,
        fused_head=fused_head,
        **kwargs,
    )


class PearSFTTrainer(SFTTrainer):  # type: ignore[misc]  # TRL has no types
    """What `make_sft_trainer` makes."""

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        live: LivePear | None = None,
        normaliser: Normaliser = "tokens",
        fused_head: bool = True,
        **kwargs: Any,
    ) -> None:
        _refuse(args, kwargs)
        require_normaliser(normaliser, live)
        self.live = live
        self.normaliser = normaliser
        self._rescaling: Tensor | None = None
        self.fused_head = fused_head
        if args.accelerator_config.dispatch_batches is None:
            # Dispatching, accelerate's way with streams, cannot join batches that are not of tensors alone.
            args.accelerator_config.dispatch_batches = False
        super().__init__(model=model, args=args, **kwargs)
        refuse_split_sequences(self.accelerator.parallelism_config)
        # TRL divides by the Trainer's count of labels, whether or not the model's own loss would.
        self.model_accepts_loss_kwargs = True
        self.data_collator = PearCollator(
            self._tokenizer.pad_token_id,
            self.padding_free,
            self.args.pad_to_multiple_of,
            require_weights=False,
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*TOKEN_COLUMNS, PACKED, "sample_id"]

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Checks in place of TRL's tokenization and truncation; its packing, of every column there is per token."""
        columns = get_dataset_column_names(dataset)
        weighted = dataset_name == "train" or WEIGHTS in columns
        required = [
            "input_ids",
            "labels",
            *([WEIGHTS] * weighted),
            *([BEHAVIOR] * (weighted and bool(self.live))),
        ]
        require_columns(dataset_name, columns, required)
        if PACKED in columns:
            require_padding_free(dataset_name, self.padding_free, packing)
        elif args.max_length is not None:
            dataset = refusing_longer_rows(dataset_name, dataset, args.max_length)
        with global_then_local_main_first():
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            if packing:
                dataset = dataset.select_columns([name for name in TOKEN_COLUMNS if name in columns])
                dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
                if args.shuffle_dataset:
                    dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """TRL's own count of labels, by which it divides; what weights are multiplied by makes up the difference."""
        labels = super()._get_num_items_in_batch(batch_samples, device)
        if self.normaliser != "tokens" and batch_samples:
            self._rescaling = labels / step_denominator(self, batch_samples, self.normaliser, device)
        return labels

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        inputs = dict(inputs)
        weights, behavior = inputs.pop(WEIGHTS, None), inputs.pop(BEHAVIOR, None)
        if weights is None and self.model.training:
            raise ValueError("a training batch has no loss_weights: train on an export of `pear-data export`")
        forward = partial(self._weighted_forward, model, weights, behavior)
        return super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)

    def _weighted_forward(
        self,
        model: Any,
        weights: Tensor | None,
        behavior: Tensor | None,
        fused_lm_head: bool = False,
        **inputs: Any,
    ) -> Any:
        """What TRL calls as the model: the outputs of its head, with weighted log-probs."""
        if not fused_lm_head:
            return model(**inputs)
        outputs = model(**inputs, fused_lm_head=True) if self.fused_head else _full_head(model, **inputs)
        if weights is not None:
            weights = self._weights(weights, behavior, outputs, inputs.get("seq_idx"))
            if self._rescaling is not None and self.model.training:
                weights = weights * self._rescaling
            outputs.log_probs = outputs.log_probs * weights
        return outputs

    def _weights(
        self, weights: Tensor, behavior: Tensor | None, outputs: Any, sequence_ids: Tensor | None
    ) -> Tensor:
        length = outputs.log_probs.size(1)
        if self.live is None:
            return _aligned(weights, length)
        if behavior is None:
            raise ValueError("a batch has no behavior_logprobs: export with --live")
        ids = None if sequence_ids is None else _aligned(sequence_ids, length)
        # Only the tokens of samples marked negative have frozen weights below 0.
        negative = _aligned(weights, length) < 0
        return self.live.weights(
            outputs.log_probs, _aligned(behavior, length), outputs.label_mask, ids, negative
        )


def _aligned(values: Tensor, length: int) -> Tensor:
    """[B, L] at the index of tokens, as [B, length] at the index of the log-probs that predict them.

    `length` is L - 1, or more with virtual tokens before each row (PEFT's prompt learning), which predict nothing.
    """
    return F.pad(values, (length - values.size(1), 0))


def _full_head(model: Any, labels: Tensor, **inputs: Any) -> FusedCausalLMOutput:
    """What TRL's fused head returns, from all logits at once."""
    outputs = model(**inputs)
    logprobs = outputs.logits[:, :-1].float().log_softmax(-1)
    targets = F.pad(labels, (outputs.logits.size(1) - labels.size(1), 0), value=IGNORE_INDEX)[:, 1:]
    mask = targets != IGNORE_INDEX
    taken = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    entropy = torch.special.entr(logprobs.detach().exp()).sum(-1)
    return FusedCausalLMOutput(
        log_probs=taken.masked_fill(~mask, 0.0),
        entropy=entropy.masked_fill(~mask, 0.0),
        is_top1=(logprobs.argmax(-1) == targets) & mask,
        label_mask=mask,
        aux_loss=getattr(outputs, "aux_loss", None),
    )


def _refuse(args: SFTConfig, arguments: Mapping[str, Any]) -> None:
    for name, (harmless, reason) in _REFUSED_SETTINGS.items():
        value = getattr(args, name)
        if value not in harmless:
            raise ValueError(f"SFTConfig({name}={value!r}) does not go with loss_weights: {reason}")
    if args.packing and args.max_length is None:
        raise ValueError("SFTConfig(packing=True) needs max_length, the tokens of a pack")
    for name, reason in _REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"make_sft_trainer takes no {name}: {reason}")
