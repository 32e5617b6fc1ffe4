"""Proof that a model's forward does no more with its logits than a fused loss can do without them.

Run once, when the loss is attached: the model's own forward, on two tokens, with its backbone and its head replaced. No
parameter is touched, so it costs nothing and works on models that are sharded, compiled, or still without memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pear_data.loss.deferred_head import DeferredLogits

_TOKENS = 2


def head_to_fuse(causal_lm: Any) -> nn.Linear:
    """The output head of a causal LM of transformers.

    Raises ValueError, naming the reason, where it is no plain `nn.Linear` (adapters and quantised heads are not), or
    the model does more with its logits than scale and soft-cap them, or hands something else to its loss.
    """
    head = causal_lm.get_output_embeddings()
    name = type(causal_lm).__name__
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"cannot fuse the head of {name}: it is a {type(head).__module__}.{type(head).__name__}, no plain "
            "nn.Linear; leave it out of adapters and quantisation, or attach with fused=False"
        )
    try:
        reason = _difference(causal_lm, head)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise ValueError(
            f"cannot fuse the head of {name}: its forward does more than scale and soft-cap its logits ({reason}); "
            "attach with fused=False"
        )
    return head


def _difference(causal_lm: Any, head: nn.Linear) -> str | None:
    """What keeps the loss from seeing a scaled and soft-capped head; None if nothing does."""
    hidden = torch.zeros(1, _TOKENS, head.in_features, dtype=head.weight.dtype, device=head.weight.device)
    logits = 8 * torch.randn(1, _TOKENS, head.out_features, generator=torch.Generator().manual_seed(0))
    deferred = _given_to_the_loss(causal_lm, head, hidden, DeferredLogits(head, hidden))
    whole = _given_to_the_loss(causal_lm, head, hidden, logits)
    if not isinstance(deferred, DeferredLogits) or not isinstance(whole, Tensor):
        return f"its loss gets a {type(deferred).__name__}"
    expected = deferred.logit_scale * logits
    if deferred.cap is not None:
        if deferred.cap <= 0:
            return f"a soft-cap of {deferred.cap}"
        expected = deferred.cap * torch.tanh(expected / deferred.cap)
    if whole.shape != expected.shape or not torch.allclose(whole.float(), expected, rtol=1e-4, atol=1e-4):
        return "its loss gets other logits than its head's"
    return None


def _given_to_the_loss(causal_lm: Any, head: nn.Linear, hidden: Tensor, output: Any) -> Any:
    """What reaches `loss_function` as logits when the head gives `output` for the backbone's `hidden`."""
    arrived = []

    def loss(logits: Any, *_args: Any, **_kwargs: Any) -> Tensor:
        arrived.append(logits)
        return hidden.new_zeros((), dtype=torch.float32)

    backbone = causal_lm.base_model
    if backbone is causal_lm:
        return None
    options = {"output_router_logits": False, "use_cache": False}
    known = inspect.signature(causal_lm.forward).parameters
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device=hidden.device)
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_replaced(causal_lm, backbone, _Backbone(backbone, hidden)))
        stack.enter_context(_replaced(causal_lm, head, _Head(head, output)))
        stack.enter_context(_loss_function(causal_lm, loss))
        used = {option: value for option, value in options.items() if option in known}
        causal_lm.forward(input_ids=ids, labels=ids, **used)
    return arrived[0] if len(arrived) == 1 else None


class _StandIn(nn.Module):
    """Has the attributes of another module, whose parameters stay that module's own."""

    def __init__(self, original: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["_original"] = original
        self.__dict__["_output"] = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


class _Head(_StandIn):
    def forward(self, _hidden: Tensor) -> Any:
        return self._output


class _Backbone(_StandIn):
    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return _BackboneOutput((self._output,))


class _BackboneOutput(tuple[Tensor]):
    """Hidden states under the name and at the place where transformers looks for them, and nothing else."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _replaced(root: nn.Module, child: nn.Module, stand_in: nn.Module) -> Iterator[None]:
    places = [
        (parent, name) for parent in root.modules() for name, one in parent._modules.items() if one is child
    ]
    for parent, name in places:
        parent._modules[name] = stand_in
    try:
        yield
    finally:
        for parent, name in places:
            parent._modules[name] = child


@contextmanager
def _loss_function(causal_lm: Any, loss: Any) -> Iterator[None]:
    before = causal_lm.__dict__.get("_loss_function")
    causal_lm.loss_function = loss
    try:
        yield
    finally:
        if before is None:
            del causal_lm._loss_function
        else:
            causal_lm.loss_function = before
