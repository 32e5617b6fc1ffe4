"""The training hook: PEAR's weighted loss in a trainer that is not ours. Imports torch and nothing else of pear_data.

    attach(model)          make a transformers causal LM use a batch's `loss_weights`
    PearCollator(pad_id)   batches of the exported dataset, padded or padding-free
    causal_loss(...)       what `attach` installs, in the signature of transformers' `ForCausalLMLoss`
    weighted_nll(...)      the same loss from per-token log-probs, for a loop of one's own

Alignment, everywhere: `loss_weights[t]` multiplies `-log p(input_ids[t] | input_ids[<t])`. It has the index of the
unshifted label, is 0 where nothing is scored, and is 0 at index 0.
"""

from __future__ import annotations

from pear_data.loss.attachment import attach
from pear_data.loss.collator import PearCollator
from pear_data.loss.nll import causal_loss, weighted_nll

__all__ = ["PearCollator", "attach", "causal_loss", "weighted_nll"]
