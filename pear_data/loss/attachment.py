"""Install the weighted loss in a transformers model, and notice when it is bypassed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pear_data.loss.nll import causal_loss

ModelT = TypeVar("ModelT", bound=nn.Module)


def attach(model: ModelT) -> ModelT:
    """Make `model` multiply each token's loss by the batch key `loss_weights`; returns the model itself.

    Sets `model.loss_function` to `causal_loss`. Every key of a batch that a transformers model's forward does not name
    reaches that function, so the Trainer needs two things more: `PearCollator`, and
    `TrainingArguments(remove_unused_columns=False)`, without which the Trainer drops the column. Evaluation uses the
    weights where the batch has them and is plain where it has not. Attach once, before or after wrapping (PEFT, DDP,
    torch.compile); attaching again does nothing. Checkpoints hold no trace of it, so attach again after loading one
    into a new model.

    A model that was **not** attached ignores `loss_weights` without a word: transformers passes unknown keys on to
    a loss that swallows them. An attached model speaks up: its first forward that got weights but computed no weighted
    loss raises RuntimeError (label smoothing, `compute_loss_func` and fused heads such as Liger's bypass
    `loss_function`), and a training step without weights warns once.

    Models with `accepts_loss_kwargs = False` get no token count from the Trainer, which averages their micro-batches
    instead, with and without weights. DeepSpeed, and FSDP with mixed precision, cast every float of a batch: in bf16
    that rounds each weight by up to 0.4 %.

    Raises ValueError for a model that is no causal LM of transformers, or whose forward does not hand its extra
    keyword arguments to `loss_function`.
    """
    causal_lm = _unwrapped(model)
    if isinstance(getattr(causal_lm, "loss_function", None), WeightedLoss):
        return model
    _require_loss_kwargs(causal_lm)
    loss = WeightedLoss()
    causal_lm.loss_function = loss
    model.register_forward_hook(loss.require_arrival, with_kwargs=True)
    return model


class WeightedLoss:
    """`causal_loss`, remembering whether a batch's weights ever reached it."""

    def __init__(self) -> None:
        self.weights_arrived = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("loss_weights") is not None:
            self.weights_arrived = True
        elif torch.is_grad_enabled():
            warnings.warn(
                "this training step is unweighted: the batch has no loss_weights (use PearCollator and "
                "remove_unused_columns=False)",
                stacklevel=2,
            )
        return causal_loss(*args, **kwargs)

    def require_arrival(
        self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], _output: object
    ) -> None:
        """Forward hook. Once weights have arrived it stays silent: the path of a model does not change by the step."""
        if kwargs.get("loss_weights") is not None and not self.weights_arrived:
            raise RuntimeError(
                "the batch has loss_weights, but the loss was computed without them: switch off what bypasses "
                "model.loss_function (label smoothing, compute_loss_func, a fused or patched head such as Liger's)"
            )


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
