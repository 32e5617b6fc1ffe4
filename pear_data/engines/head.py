"""The output head of a causal language model, applied in blocks so that no [tokens, vocabulary] array exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

ROW_BLOCK = {"cpu": 1024, "cuda": 4096}
VOCAB_BLOCK = {"cpu": 2048, "cuda": 16384}
# Sums of exponentials outside these bounds may have lost terms to float32's range.
SAFE_SUMS = (1e-30, 1e30)


@dataclass(frozen=True)
class BlockedHead:
    """logits = scale * (h W^T + b), soft-capped to cap * tanh(logits / cap) where the model does so."""

    weight: torch.Tensor  # [vocab, hidden]
    bias: torch.Tensor | None  # [vocab]
    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, model: Any) -> BlockedHead | None:
        """The head of a transformers model as its modules and configuration describe it; None for another shape."""
        module = model.get_output_embeddings()
        if not isinstance(module, torch.nn.Linear) or not module.weight.is_floating_point():
            return None
        config = model.config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        return cls(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Natural-log probability of each target.

        Args:
            hidden: the rows that predict the targets, [R, hidden], any float dtype.
            targets: token ids, [R], int64.

        Returns:
            [R], float32, at most 0: logits, log-sum-exp and the target's logit are all formed in float32 (bfloat16
            models on a CPU: logits to 17 bits).
        """
        count = max(1, -(-len(hidden) // ROW_BLOCK[hidden.device.type]))
        blocks = zip(torch.tensor_split(hidden, count), torch.tensor_split(targets, count), strict=True)
        return torch.cat([self._block_logprobs(h, t) for h, t in blocks])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits of a few rows, [R, vocab] float32: what the self-check compares with the model's own."""
        return torch.cat([block for _, block in self._logit_blocks(hidden)], dim=1)

    def _block_logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # A target's logit is formed on its own, so it may exceed the sum's by a rounding; a probability is at most 1.
        return (self._target_logits(hidden, targets) - self._log_sum_exp(hidden)).clamp_(max=0.0)

    def _target_logits(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = (hidden.float() * self.weight[targets].float()).sum(1)
        return self._finished(logits, None if self.bias is None else self.bias[targets])

    def _log_sum_exp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Exponentials are summed as they are, in one pass; only rows that this fails take the one with a peak."""
        total = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        for _, logits in self._logit_blocks(hidden):
            total += logits.exp_().sum(1)
        safe = (total > SAFE_SUMS[0]) & (total < SAFE_SUMS[1])
        found = total.log()
        if not safe.all():
            found[~safe] = self._shifted_log_sum_exp(hidden[~safe])
        return found

    def _shifted_log_sum_exp(self, hidden: torch.Tensor) -> torch.Tensor:
        peak = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        total = torch.zeros_like(peak)
        for _, logits in self._logit_blocks(hidden):
            higher = torch.maximum(peak, logits.amax(1))
            total = total * (peak - higher).exp() + logits.sub_(higher[:, None]).exp_().sum(1)
            peak = higher
        return peak + total.log()

    def _logit_blocks(self, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first token id, float32 logits [R, columns]) for one stretch of the vocabulary after the other."""
        for first in range(0, len(self.weight), VOCAB_BLOCK[hidden.device.type]):
            stretch = slice(first, first + VOCAB_BLOCK[hidden.device.type])
            products = _float32_product(hidden, self.weight[stretch])
            yield first, self._finished(products, None if self.bias is None else self.bias[stretch])

    def _finished(self, products: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Logits from the products of hidden states and weights, in place."""
        if bias is not None:
            products += bias.float()
        if self.scale != 1.0:
            products *= self.scale
        if self.soft_cap is not None:
            products = products.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return products


def _float32_product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T in float32: rounding logits of size 20 to bfloat16 would add errors of 0.06 to log-probs."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        # Half-precision inputs, float32 accumulation and result: exact products at tensor-core speed.
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    if hidden.dtype == torch.bfloat16 and _residuals_are_fused():
        rounded = hidden @ weight.T
        # What rounding left out, itself rounded: together 17 bits, in half the time of a product in float32.
        residual = torch.addmm(rounded, hidden, weight.T, beta=-1)
        return rounded.float().add_(residual)
    return hidden.float() @ weight.float().T


@cache
def _residuals_are_fused() -> bool:
    """Whether this CPU's bfloat16 `addmm` subtracts before it rounds; it does where there are instructions for it."""
    ramp = torch.linspace(-3, 3, 64 * 64).view(64, 64).bfloat16()
    rounded = ramp @ ramp.T
    recovered = rounded.double() + torch.addmm(rounded, ramp, ramp.T, beta=-1).double()
    exact = ramp.double() @ ramp.double().T
    return bool((recovered - exact).abs().max() < 1e-4 * exact.abs().max())


def full_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Natural-log probability of each target, [R] float32, from the rows' full logits [R, vocab], in row blocks."""
    rows = ROW_BLOCK[logits.device.type]
    blocks = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    return torch.cat([_row_logprobs(row.float(), target) for row, target in blocks])


def _row_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
