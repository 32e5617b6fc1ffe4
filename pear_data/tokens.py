"""Tokenized samples as flat arrays: what the corpus hands to engines and kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """n samples holding N tokens; sample i is `input_ids[offsets[i]:offsets[i + 1]]`.

    `loss_mask` marks the scored tokens. The first token of a sample is never scored: nothing precedes it.
    """

    sample_ids: Sequence[str]
    input_ids: npt.NDArray[np.int32]  # [N]
    loss_mask: npt.NDArray[np.bool_]  # [N]
    offsets: IntArray  # [n + 1], from 0 to N

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> IntArray:
        """Tokens of each sample, [n]."""
        return np.diff(self.offsets)

    @property
    def scored_offsets(self) -> IntArray:
        """Where each sample starts among the scored tokens, [n + 1]."""
        running = np.concatenate(([0], np.cumsum(self.loss_mask, dtype=np.int64)))
        return running[self.offsets]

    @property
    def num_scored(self) -> IntArray:
        """Scored tokens of each sample, [n]."""
        return np.diff(self.scored_offsets)

    def take(self, rows: Sequence[int] | IntArray) -> TokenBatch:
        """The samples at `rows`, in that order, as a batch of their own."""
        index = np.asarray(rows, dtype=np.int64)
        lengths = self.num_tokens[index]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        flat = np.repeat(self.offsets[index] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenBatch(
            [self.sample_ids[i] for i in index], self.input_ids[flat], self.loss_mask[flat], offsets
        )
