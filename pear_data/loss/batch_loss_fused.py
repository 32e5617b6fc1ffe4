"""A batch's weighted loss from hidden states, within the head's own forward.

Imported with the first fused loss: it runs as it is in a compiled model too, and the compiler is a large import.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pear_data.loss.alignment import shape_of
from pear_data.loss.batch_loss import LossBatch
from pear_data.loss.deferred_head import DeferredLogits
from pear_data.loss.fused import WeightsOfRows, linear_logprobs, linear_weighted_nll
from pear_data.loss.live import LivePear


def loss_from_hidden(
    logits: DeferredLogits, batch: LossBatch, live: LivePear | None, denom: Tensor | float, backend: str
) -> Tensor:
    """`loss_from_logits` without the logits; all tokens weigh 1 where the batch has no weights."""
    if logits.hidden.shape[:-1] != batch.targets.shape:
        raise ValueError(
            f"hidden states {shape_of(logits.hidden)} and labels {shape_of(batch.targets)} do not fit: leave "
            "logits_to_keep out where there are labels"
        )
    head = {"logit_scale": logits.logit_scale, "softcap": logits.cap}
    return logits.inside(
        partial(_inside_head, batch=batch, live=live, denom=denom, backend=backend, head=head)
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _inside_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    batch: LossBatch,
    live: LivePear | None,
    denom: Tensor | float,
    backend: str,
    head: dict[str, Any],
) -> Tensor:
    def logprobs(of: LossBatch) -> Tensor:
        return linear_logprobs(hidden, weight, of.targets, bias=bias, **head)

    weights: Any = batch.weights
    if weights is None:
        weights = torch.ones_like(batch.targets, dtype=torch.float32)
    elif live is not None:
        batch = batch if live.negative_scale else batch.of_negatives(False)
        weights = _live_weights(batch, live, logprobs)
    return linear_weighted_nll(
        hidden, weight, batch.targets, weights, denom=denom, bias=bias, backend=backend, **head
    )


def _live_weights(
    batch: LossBatch, live: LivePear, logprobs: Callable[[LossBatch], Tensor]
) -> Tensor | WeightsOfRows:
    """Weights that rest on whole sequences need log-probs first, one more multiply for the tokens concerned."""
    if live.level == "sequence":
        return batch.live_weights(live, logprobs(batch))
    of_rows = batch.live_weights_of_rows(live)
    if not live.negative_scale:
        return of_rows
    negatives = batch.of_negatives(True)
    of_negatives = negatives.live_weights(live, logprobs(negatives)).reshape(-1)
    is_negative = negatives.scored.reshape(-1)

    def weights(rows: Tensor, found: Tensor) -> Tensor:
        return torch.where(is_negative[rows], of_negatives[rows], of_rows(rows, found))

    return weights
