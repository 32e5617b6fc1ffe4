"""Which rows go through the output head together."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

# By bytes of a logit. Smaller chunks spend their time on adding to the head's gradient, which is as large as the head.
# In 16 bits several chunks take sums in float32, and on a CPU a fourth multiply to fill them: as large as fits in the
# bytes below, then.
_CHUNK_ROWS = {2: 2048, 4: 512, 8: 256}
_LARGE_CHUNK_BYTES = 768 << 20
_ROWS_OF_A_TILE = 128


def split_rows(
    weight: Tensor, rows: Tensor, chunk_rows: int | None, begins: Tensor | None
) -> tuple[Tensor, ...]:
    """Parts of `rows` [n] for the head `weight` [V, H], of about one size: `chunk_rows`, or what suits the head.

    With `begins` [S] (ascending, the first 0) they are parted there and nowhere else: a chunk takes sequences until it
    has that size, and none with which its logits would exceed `_LARGE_CHUNK_BYTES`.
    """
    if not len(rows):
        return ()
    size = chunk_rows
    if size is None:
        size = _CHUNK_ROWS[weight.element_size()]
        if weight.is_cuda or weight.element_size() == 2:
            size = max(size, _rows_of_a_large_chunk(weight))
        even = math.ceil(len(rows) / math.ceil(len(rows) / size))
        size = min(size, math.ceil(even / _ROWS_OF_A_TILE) * _ROWS_OF_A_TILE)
    if begins is None:
        return torch.split(rows, size)
    most = max(size, _rows_of_a_large_chunk(weight))
    cuts = [0]
    for begin, end in pairwise([*begins.tolist(), len(rows)]):
        if begin - cuts[-1] >= size or (begin > cuts[-1] and end - cuts[-1] > most):
            cuts.append(begin)
    return torch.split(rows, [end - begin for begin, end in pairwise([*cuts, len(rows)])])


def fits_in_a_chunk(weight: Tensor, rows: int) -> bool:
    """Whether a sequence of so many rows is no larger than chunks are anyway."""
    return rows <= max(_CHUNK_ROWS[weight.element_size()], _rows_of_a_large_chunk(weight))


def _rows_of_a_large_chunk(weight: Tensor) -> int:
    return _LARGE_CHUNK_BYTES // (len(weight) * weight.element_size())
