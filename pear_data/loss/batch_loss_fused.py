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
from pear_data.loss.chunks import fits_in_a_chunk
from pear_data.loss.deferred_head import DeferredLogits
from pear_data.loss.fused import WeightsOfRows, linear_logprobs, linear_weighted_nll
from pear_data.loss.live import LivePear, LiveWeightsOfRows


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

    def sequences_fit(of_rows: LiveWeightsOfRows) -> bool:
        if backend != "ours":  # asks for all rows at once
            return True
        # On CUDA their lengths would be one more wait for the device.
        return not hidden.is_cuda and fits_in_a_chunk(weight, of_rows.longest_sequence())

    weights: Any = batch.weights
    if weights is None:
        weights = torch.ones_like(batch.targets, dtype=torch.float32)
    elif live is not None:
        batch = batch if live.negative_scale else batch.of_negatives(False)
        weights = _live_weights(batch, live, logprobs, sequences_fit)
    return linear_weighted_nll(
        hidden, weight, batch.targets, weights, denom=denom, bias=bias, backend=backend, **head
    )


def _live_weights(
    batch: LossBatch,
    live: LivePear,
    logprobs: Callable[[LossBatch], Tensor],
    fit: Callable[[LiveWeightsOfRows], bool],
) -> Tensor | WeightsOfRows:
    """Where weights rest on whole sequences that do not fit in a chunk, log-probs come first: one more multiply."""
    has_negatives = live.negative_scale > 0
    of_rows = batch.live_weights_of_rows(live, has_negatives)
    if not (has_negatives or live.level == "sequence") or fit(of_rows):
        return of_rows
    if live.level == "sequence":
        return batch.live_weights(live, logprobs(batch))
    others = batch.live_weights_of_rows(live, False)
    negatives = batch.of_negatives(True)
    of_negatives = negatives.live_weights(live, logprobs(negatives)).reshape(-1)
    is_negative = negatives.scored.reshape(-1)

    def weights(rows: Tensor, found: Tensor) -> Tensor:
        return torch.where(is_negative[rows], of_negatives[rows], others(rows, found))

    return weights
