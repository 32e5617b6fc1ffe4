"""The weighted loss on tensors: L = sum_t stop_gradient(w_t) * -log p(y_t | x, y_<t) / N  (the paper's section 3.7).

Nothing here waits for the device: no value of a tensor is ever read on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pear_data.loss.alignment import IGNORE_INDEX, next_token, shape_of


def weighted_nll(logprobs: Tensor, weights: Tensor, mask: Tensor, *, denom: Tensor | float) -> Tensor:
    """`-sum(weights * logprobs over mask) / denom`, with no gradient through the weights.

    `logprobs` (natural log), `weights` and `mask` (true or 1 where a token is scored) have one shape and one
    alignment: entry i of each belongs to the same predicted token. Values outside the mask are never used, so they
    may be non-finite. Summed in float32, or in float64 when `logprobs` are. `denom` is the number of scored tokens in
    the whole optimizer step, over gradient accumulation and ranks. Negative weights push a token's probability down.
    Raises ValueError when the shapes differ.
    """
    if not logprobs.shape == weights.shape == mask.shape:
        raise ValueError(
            f"logprobs {shape_of(logprobs)}, weights {shape_of(weights)} and mask {shape_of(mask)} must have "
            "one shape: give each scored token its own weight"
        )
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    unscored = ~mask.to(logprobs.device).bool()
    weights = weights.detach().to(logprobs.device, dtype).masked_fill(unscored, 0.0)
    total = -(weights * logprobs.to(dtype).masked_fill(unscored, 0.0)).sum()
    return total / (denom.to(logprobs.device) if isinstance(denom, Tensor) else denom)


def causal_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    loss_weights: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Next-token loss with a weight per token; a drop-in for transformers' `ForCausalLMLoss`.

    `logits` [B, L, vocab_size] in any float dtype (computed in float32), `labels` [B, L] unshifted, `loss_weights`
    [B, L] at the index of the label they multiply. The sum is divided by `num_items_in_batch`, the Trainer's count of
    scored labels over gradient accumulation and ranks, or without it by the number of scored labels here (0 scored
    labels give a loss of 0). Without `loss_weights` it is `ForCausalLMLoss` exactly. `shift_labels` [B, L], where
    given, replace the labels shifted here; the weights stay unshifted and whole, so a sequence split over devices
    is not supported. Other `kwargs` belong to the model and are ignored.

    Raises ValueError for weights of another shape than the labels, and for label smoothing, under which a weight has
    no single token to multiply.
    """
    if kwargs.get("label_smoothing"):
        raise ValueError("loss_weights do not go with label smoothing: leave label_smoothing at 0")
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_loss got neither labels nor shift_labels: put `labels` into the batch")
        shift_labels = next_token(labels, ignore_index)
    targets = shift_labels.to(logits.device)
    if loss_weights is None:
        return _plain_loss(
            logits.float().reshape(-1, vocab_size), targets.reshape(-1), num_items_in_batch, ignore_index
        )
    if loss_weights.shape != shift_labels.shape:
        raise ValueError(
            f"loss_weights {shape_of(loss_weights)} and labels {shape_of(shift_labels)} must have one shape: "
            "batch them together, with PearCollator"
        )
    logprobs = token_logprobs(logits, targets, vocab_size, ignore_index)
    scored = targets != ignore_index
    denom = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return weighted_nll(logprobs, next_token(loss_weights, 0.0), scored, denom=denom)


def token_logprobs(
    logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Log-probs of `targets` [B, L] under `logits` [B, L, vocab_size]: float32 [B, L], 0 where ignored."""
    nll = F.cross_entropy(
        logits.float().reshape(-1, vocab_size),
        targets.reshape(-1),
        ignore_index=ignore_index,
        reduction="none",
    )
    return -nll.view(targets.shape)


def _plain_loss(
    flat_logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | float | None, ignore_index: int
) -> Tensor:
    if num_items_in_batch is None:
        return F.cross_entropy(flat_logits, targets, ignore_index=ignore_index)
    total = F.cross_entropy(flat_logits, targets, ignore_index=ignore_index, reduction="sum")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
