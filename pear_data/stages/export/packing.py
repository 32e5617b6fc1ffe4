"""Best-fit-decreasing packs of a row group's samples."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.stages.export.rows import Rows


@dataclass(frozen=True, slots=True)
class Packs:
    """Samples in the order of their packs, and how many each pack has."""

    rows: Rows
    samples: npt.NDArray[np.int64]


def packed(rows: Rows, max_length: int) -> Packs:
    """Samples, none longer than `max_length`, in packs of at most that many tokens.

    The longest sample first, each into the fullest pack that has room for it; a pack's samples keep the corpus's order.
    """
    packs = _best_fit(rows.lengths, max_length)
    order = np.concatenate([np.sort(pack) for pack in packs]) if packs else np.zeros(0, np.int64)
    return Packs(_in_order(rows, order), np.array([len(pack) for pack in packs], dtype=np.int64))


def _best_fit(lengths: npt.NDArray[np.int64], max_length: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left and pack, ascending
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        at = bisect_left(room, (length, -1))
        if at == len(room):
            left, pack = max_length, len(packs)
            packs.append([])
        else:
            left, pack = room.pop(at)
        packs[pack].append(sample)
        insort(room, (left - length, pack))
    return packs


def _in_order(rows: Rows, order: npt.NDArray[np.int64]) -> Rows:
    lengths = rows.lengths[order]
    starts = np.cumsum(lengths) - lengths
    tokens = np.arange(int(lengths.sum())) + np.repeat(rows.offsets[:-1][order] - starts, lengths)
    index, behavior = pa.array(order), rows.behavior_logprobs
    return replace(
        rows,
        sample_id=rows.sample_id.take(index),
        source=rows.source.take(index),
        record=None,
        lengths=lengths,
        input_ids=rows.input_ids[tokens],
        scored=rows.scored[tokens],
        loss_weights=rows.loss_weights[tokens],
        behavior_logprobs=None if behavior is None else behavior[tokens],
    )
