"""Install the weighted loss in a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from pear_data.loss.deferred_head import DeferredHead
from pear_data.loss.head_proof import head_to_fuse
from pear_data.loss.live import LivePear
from pear_data.loss.normaliser import Normaliser
from pear_data.loss.weighted_loss import LossSettings, WeightedLoss

ModelT = TypeVar("ModelT", bound=nn.Module)


def attach(
    model: ModelT,
    *,
    fused: bool = False,
    backend: str = "ours",
    live: LivePear | None = None,
    normaliser: Normaliser = "tokens",
) -> ModelT:
    """Make `model` multiply each token's loss by the batch key `loss_weights`; returns the model itself.

    Sets `model.loss_function`. Every key of a batch that a transformers model's forward does not name
    reaches that function, so the Trainer needs two things more: `PearCollator`, and
    `TrainingArguments(remove_unused_columns=False)`, without which the Trainer drops the column. Evaluation uses the
    weights where the batch has them and is plain where it has not. Attach once, before or after wrapping (PEFT, DDP,
    FSDP2, torch.compile); attaching again with the same settings does nothing. Checkpoints hold no trace of it, so
    attach again after loading one into a new model.

    `fused=True` gives hidden states and head to `linear_weighted_nll`, by `backend`. With labels in the batch, in
    evaluation too, logits are then never made and the output's are None; without labels, and in generation, all is as
    ever. What the model's forward does to its logits (a scale, a soft-cap) is proved here, on a forward without
    backbone, and taken over. Gradients serve one backward pass.

    `live` forms the weights from the model's own log-probs and the batch key `behavior_logprobs` (`export --live`) in
    every forward; of `loss_weights` only the sign counts, which marks negatives.

    The sum is divided by the batch key `loss_denominator` where there is one. Else, in training, by what `normaliser`
    says: "tokens", the number of labels, over gradient accumulation and ranks where the Trainer counts them
    (`num_items_in_batch`); a number; "weights" or "sequences" of the batch, which is the step's only where a step is
    one batch, and refused where the Trainer counts: `pear_data.hooks.transformers.PearTrainer` sums them over the step.
    Evaluation is divided by its labels always.

    A model that was **not** attached ignores `loss_weights` without a word: transformers passes unknown keys on to
    a loss that swallows them. An attached model speaks up: its first forward that got weights but computed no weighted
    loss raises RuntimeError (label smoothing, `compute_loss_func` and fused heads such as Liger's bypass
    `loss_function`), and a training step without weights warns once.

    Models with `accepts_loss_kwargs = False` get no token count from the Trainer, which averages their micro-batches
    instead, with and without weights. DeepSpeed, and FSDP with mixed precision, cast every float of a batch: in bf16
    that rounds each weight by up to 0.4 %, and live weights refuse such `behavior_logprobs`.

    Raises ValueError for a model that is no causal LM of transformers, or whose forward does not hand its extra
    keyword arguments to `loss_function`; with `fused`, for a head that is no plain `nn.Linear` or whose logits the
    forward does more to; for settings that do not go together, and for other settings than it is attached with.
    """
    settings = LossSettings(fused, backend, live, normaliser)
    causal_lm = _unwrapped(model)
    attached = attached_loss(model)
    if attached is not None:
        if attached.settings != settings:
            raise ValueError(f"the model is attached already, with {attached.settings}: load it anew")
        return model
    _require_loss_kwargs(causal_lm)
    head = None
    if fused:
        linear = head_to_fuse(causal_lm)
        head = DeferredHead(linear)
        linear.forward = head  # type: ignore[method-assign,assignment]
    loss = WeightedLoss(settings, head)
    causal_lm.loss_function = loss
    causal_lm.register_forward_pre_hook(loss.before_forward, with_kwargs=True)
    causal_lm.register_forward_hook(loss.after_forward)
    model.register_forward_hook(loss.require_arrival, with_kwargs=True)
    return model


def attached_loss(model: nn.Module) -> WeightedLoss | None:
    """What `attach` installed in a model or in what it wraps."""
    loss = getattr(_unwrapped(model), "loss_function", None)
    return loss if isinstance(loss, WeightedLoss) else None


def _unwrapped(model: Any) -> Any:
    """The causal LM inside torch.compile, DDP and PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _require_loss_kwargs(model: Any) -> None:
    name = type(model).__name__
    loss: Callable[..., Tensor] | None = getattr(model, "loss_function", None)
    if getattr(loss, "__name__", None) != "ForCausalLMLoss" or getattr(
        model.config, "is_encoder_decoder", False
    ):
        raise ValueError(
            f"cannot attach to {name}: its loss is not transformers' next-token loss; "
            "attach a causal LM, or use weighted_nll on its log-probs"
        )
    forward = inspect.unwrap(model.forward)
    takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    if not takes_kwargs or "loss_function" not in forward.__code__.co_names:
        raise ValueError(
            f"cannot attach to {name}: its forward does not pass keyword arguments on to loss_function; "
            "use weighted_nll on its log-probs"
        )
