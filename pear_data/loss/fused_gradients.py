"""Gradients of the output head's inputs, summed over chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pear_data.loss.epilogue import statistics_dtype

_VOCABULARY_TILE = 2048


class GradientSums:
    """Gradients by hidden states, head and bias, those wanted; in float32 where 16 bits are summed over chunks."""

    def __init__(
        self, hidden: Tensor, head: Tensor, bias: Tensor | None, wanted: list[bool], chunks: int
    ) -> None:
        """`hidden` [N, H] and `bias` [V] in their own dtypes, `head` [V, H] in that of the multiplies."""
        exact = statistics_dtype(head.dtype)
        # What has 16 bits is rounded once: here if that is the last thing that happens to it.
        to_be_scaled = head.dtype == torch.float16
        sums = head.dtype if chunks == 1 and not to_be_scaled else exact
        # The first chunk is written, not added: nothing needs to be zero before.
        empty = torch.empty_like if chunks else torch.zeros_like
        self._head = head
        self._fresh = True
        self.hidden = torch.zeros_like(hidden, dtype=exact if to_be_scaled else None) if wanted[0] else None
        self.head = empty(head, dtype=sums) if wanted[1] else None
        self.bias = empty(bias, dtype=sums) if bias is not None and wanted[2] else None

    def add(self, rows: Tensor, states: Tensor, gradients: Tensor, factor: Tensor | None) -> None:
        """Take a chunk in: `factor` [n] times `gradients` [n, V] belong to the head's outputs for `states` [n, H]."""
        if self.hidden is not None:
            product = gradients @ self._head
            if factor is not None:
                product *= factor[:, None]
            self.hidden[rows] = product.to(self.hidden.dtype)
        if self.head is not None:
            self._accumulate(self.head, gradients, states if factor is None else states * factor[:, None])
        if self.bias is not None:
            ones = gradients.new_ones(len(gradients)) if factor is None else factor
            self._accumulate(self.bias[:, None], gradients, ones[:, None])
        self._fresh = False

    def scaled(self, factor: Tensor, dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
        """The gradients by hidden states, head and bias times `factor`, in `dtypes`; uses their memory up."""
        nothing_to_do = not factor.is_cuda and factor == 1.0
        scaled: list[Tensor | None] = []
        for one, dtype in zip((self.hidden, self.head, self.bias), dtypes, strict=True):
            if one is None or (nothing_to_do and one.dtype == dtype):
                scaled.append(one)
            else:
                out = one if one.dtype == dtype else torch.empty_like(one, dtype=dtype)
                scaled.append(torch.mul(one, factor.to(one.dtype), out=out))
        return scaled

    def _accumulate(self, total: Tensor, gradients: Tensor, states: Tensor) -> None:
        """`total` [V, .] += gradients.T @ states."""
        beta = 0 if self._fresh else 1
        if total.dtype == gradients.dtype:
            total.addmm_(gradients.T, states, beta=beta)
        elif gradients.is_cuda:
            torch.addmm(total, gradients.T, states, beta=beta, out_dtype=total.dtype, out=total)
        else:
            for start in range(0, len(total), _VOCABULARY_TILE):
                tile = slice(start, start + _VOCABULARY_TILE)
                part = gradients[:, tile].T @ states
                # What that rounded off: a CPU has no product of 16 bits in float32.
                rest = torch.addmm(part, gradients[:, tile].T, states, beta=-1)
                total[tile] = part if self._fresh else total[tile].add_(part)
                total[tile] += rest
