"""The output head of a causal language model, applied in blocks so that no [tokens, vocabulary] array exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

ROW_BLOCK = {"cpu": 1024, "cuda": 4096}
VOCAB_BLOCK = {"cpu": 1024, "cuda": 16384}


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
            [R], float32: logits, log-sum-exp and the target's logit are all formed in float32.
        """
        rows = ROW_BLOCK[hidden.device.type]
        blocks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        return torch.cat([self._block_logprobs(h, t) for h, t in blocks])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits of a few rows, [R, vocab] float32: what the self-check compares with the model's own."""
        return torch.cat([block for _, block in self._logit_blocks(hidden)], dim=1)

    def _block_logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        peak = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        total = torch.zeros_like(peak)
        target_logits = torch.empty_like(peak)
        for first, logits in self._logit_blocks(hidden):
            column = targets - first
            inside = (column >= 0) & (column < logits.shape[1])
            found = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            target_logits = torch.where(inside, found, target_logits)
            higher = torch.maximum(peak, logits.amax(1))
            total = total * (peak - higher).exp() + logits.sub_(higher[:, None]).exp_().sum(1)
            peak = higher
        return target_logits - peak - total.log()

    def _logit_blocks(self, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first token id, float32 logits [R, columns]) for one stretch of the vocabulary after the other."""
        for first in range(0, len(self.weight), VOCAB_BLOCK[hidden.device.type]):
            stretch = slice(first, first + VOCAB_BLOCK[hidden.device.type])
            logits = _float32_product(hidden, self.weight[stretch])
            if self.bias is not None:
                logits += self.bias[stretch].float()
            if self.scale != 1.0:
                logits *= self.scale
            if self.soft_cap is not None:
                logits = logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
            yield first, logits


def _float32_product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T in float32: rounding logits of size 20 to bfloat16 would add errors of 0.06 to log-probs."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        # Half-precision inputs, float32 accumulation and result: exact products at tensor-core speed.
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def full_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Natural-log probability of each target, [R] float32, from the rows' full logits [R, vocab], in row blocks."""
    rows = ROW_BLOCK[logits.device.type]
    blocks = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    return torch.cat([_row_logprobs(row.float(), target) for row, target in blocks])


def _row_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
