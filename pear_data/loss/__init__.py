"""The training hook: PEAR's weighted loss in a trainer that is not ours. Imports torch and nothing else of pear_data.

    attach(model)            make a transformers causal LM use a batch's `loss_weights`: fused, live, by any normaliser
    PearCollator(pad_id)     batches of the exported dataset, padded or padding-free
    causal_loss(...)         what `attach` installs at its plainest, in the signature of transformers' `ForCausalLMLoss`
    weighted_nll(...)        the same loss from per-token log-probs, for a loop of one's own
    linear_weighted_nll(...) the same loss from hidden states and output head, never the logits; linear_logprobs(...)
    live_weights(...)        weights from the model's own log-probs; LivePear and LiveWeightsOfRows hold its settings
    denominator(batch, ...)  a batch's part of what its step is divided by

Alignment, everywhere: `loss_weights[t]` multiplies `-log p(input_ids[t] | input_ids[<t])`. It has the index of the
unshifted label, is 0 where nothing is scored, and is 0 at index 0.
"""

from __future__ import annotations

from pear_data.loss.attachment import attach
from pear_data.loss.collator import PearCollator
from pear_data.loss.fused import linear_logprobs, linear_weighted_nll
from pear_data.loss.live import LivePear, LiveWeightsOfRows, live_weights
from pear_data.loss.nll import causal_loss, weighted_nll
from pear_data.loss.normaliser import denominator

__all__ = [
    "LivePear",
    "LiveWeightsOfRows",
    "PearCollator",
    "attach",
    "causal_loss",
    "denominator",
    "linear_logprobs",
    "linear_weighted_nll",
    "live_weights",
    "weighted_nll",
]
