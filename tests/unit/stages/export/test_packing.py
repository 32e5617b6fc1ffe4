"""Best-fit-decreasing packs against a plain loop."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pear_data.stages.export.packing import packed
from pear_data.stages.export.rows import Rows


def rows_of(lengths):
    total = int(lengths.sum())
    names = pa.array([f"s{i}" for i in range(len(lengths))])
    return Rows(
        sample_id=names,
        source=names,
        record=None,
        lengths=lengths,
        input_ids=np.arange(total, dtype=np.int32),
        scored=np.ones(total, dtype=np.bool_),
        loss_weights=np.arange(total, dtype=np.float32),
        behavior_logprobs=None,
    )


def plain_best_fit(lengths, room):
    """The tokens of each pack, by looking at every pack for every sample."""
    packs = []
    for length in sorted(lengths, reverse=True):
        fits = [number for number, used in enumerate(packs) if used + length <= room]
        if fits:
            packs[max(fits, key=lambda number: packs[number])] += length
        else:
            packs.append(length)
    return sorted(packs)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_decreasing(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 101, 200)
    packs = packed(rows_of(lengths), 100)
    of_pack = np.repeat(np.arange(len(packs.samples)), packs.samples)
    tokens = np.bincount(of_pack, packs.rows.lengths).astype(int)
    assert sorted(tokens) == plain_best_fit(lengths.tolist(), 100)
    assert sorted(packs.rows.sample_id.to_pylist()) == sorted(f"s{i}" for i in range(200))
    starts = np.cumsum(lengths) - lengths
    wanted = [
        np.arange(starts[int(name[1:])], starts[int(name[1:])] + lengths[int(name[1:])])
        for name in packs.rows.sample_id.to_pylist()
    ]
    np.testing.assert_array_equal(packs.rows.input_ids, np.concatenate(wanted))


def test_samples_that_fill_a_pack_stand_alone():
    packs = packed(rows_of(np.array([8, 8, 8])), 8)
    assert packs.samples.tolist() == [1, 1, 1]
