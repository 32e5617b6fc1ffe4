"""One pass over the token weights of several weightings: rank correlation, and where two differ most.

Memory is bounded by a row group of each weighting.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.binning import BINS, bins_of
from pear_data.stages.alignment import aligned_row_groups
from pear_data.stages.compared_samples import ComparedSamples, columns_of, pairs
from pear_data.stages.rank_correlation import Correlation, shared_ranks
from pear_data.store import Store
from pear_data.store.columns import flat_values

Floats = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

# What a weight of 0 counts as where logarithms are taken.
LEAST_WEIGHT = np.finfo(np.float32).tiny


class Extreme(NamedTuple):
    """A token at which two weightings differ: the log of the first's weight minus the log of the second's."""

    difference: float
    sample: int  # among the compared samples
    t: int  # among the sample's scored tokens, from 0
    first: float
    second: float


class ComparedTokens:
    """What the pass finds, for k weightings."""

    def __init__(self, weightings: int, wanted: int) -> None:
        self.correlation = Correlation(weightings)
        self.log_sums: Floats = np.zeros(weightings)
        self._wanted = wanted
        self._highest: dict[tuple[int, int], list[Extreme]] = {pair: [] for pair in pairs(weightings)}
        self._lowest: dict[tuple[int, int], list[Extreme]] = {pair: [] for pair in pairs(weightings)}

    def add(self, weights: Sequence[Weights], ranks: Sequence[Floats], lengths: Counts, first: int) -> None:
        """Take in whole samples.

        Args:
            weights: k columns of weights, flat.
            ranks: the rank of every bin, for each column.
            lengths: tokens of each sample, each at least 1.
            first: place of the first of the samples among all.
        """
        self.correlation.add([table[bins_of(column)] for table, column in zip(ranks, weights, strict=True)])
        logs = [logs_of(column) for column in weights]
        self.log_sums += [column.sum(dtype=np.float64) for column in logs]
        starts = np.cumsum(lengths) - lengths
        for (one, other), highest in self._highest.items():
            apart = logs[one] - logs[other]
            columns = weights[one], weights[other]
            highest += self._extremes(apart, columns, starts, lengths, first, sign=1)
            lowest = self._lowest[one, other]
            lowest += self._extremes(apart, columns, starts, lengths, first, sign=-1)
            highest[:] = heapq.nlargest(self._wanted, highest)
            lowest[:] = heapq.nsmallest(self._wanted, lowest)

    def _extremes(
        self,
        apart: Weights,
        columns: tuple[Weights, Weights],
        starts: Counts,
        lengths: Counts,
        first: int,
        sign: int,
    ) -> Iterator[Extreme]:
        """The farthest token of each of the samples that go farthest in one direction."""
        signed = apart * np.float32(sign)
        farthest = np.maximum.reduceat(signed, starts)
        for row in largest(farthest, self._wanted).tolist():
            start = int(starts[row])
            t = int(signed[start : start + int(lengths[row])].argmax())
            values = (float(column[start + t]) for column in columns)
            yield Extreme(float(apart[start + t]), first + row, t, *values)

    def farthest(self, pair: tuple[int, int], usual: float) -> list[Extreme]:
        """The tokens whose difference is farthest from `usual`, farthest first, at most one of a sample."""
        by_sample: dict[int, Extreme] = {}
        for found in (*self._highest[pair], *self._lowest[pair]):
            known = by_sample.get(found.sample)
            if known is None or abs(found.difference - usual) > abs(known.difference - usual):
                by_sample[found.sample] = found
        return heapq.nlargest(
            self._wanted, by_sample.values(), key=lambda found: (abs(found.difference - usual), -found.sample)
        )


def compare_tokens(
    store: Store, names: Sequence[str], samples: ComparedSamples, wanted: int
) -> ComparedTokens:
    """Read the weights of `samples` under the weightings `names` once, or twice where the stored histograms are not
    of these samples alone.

    Raises:
        MismatchError: an artefact differs from its manifest, or the weightings in their rows.
    """
    ranks = [shared_ranks(counts) for counts in _bin_counts(store, names, samples)]
    found = ComparedTokens(len(names), wanted)
    for weights, lengths, first in _row_groups(store, names, samples):
        found.add(weights, ranks, lengths, first)
    return found


def logs_of(weights: Weights) -> Weights:
    """The logarithm of each weight; that of the least float32 for a weight of 0."""
    logs: Weights = np.log(np.maximum(weights, LEAST_WEIGHT))
    return logs


def largest(values: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.intp]:
    """Places of the `count` largest of the values, or of all where there are fewer."""
    if count >= len(values):
        return np.arange(len(values))
    return np.argpartition(values, -count)[-count:]


def _row_groups(
    store: Store, names: Sequence[str], samples: ComparedSamples
) -> Iterator[tuple[list[Weights], Counts, int]]:
    """Weights of the compared samples of each row group, their lengths, and the place of the first."""
    columns = {f"weights/{name}": ["weights"] for name in names}
    first = 0
    for shard, kept in zip(samples.shards, samples.kept, strict=True):
        row = 0
        for tables in aligned_row_groups(store, shard, columns):
            rows = kept[row : row + len(next(iter(tables.values())))]
            row += len(rows)
            count = int(rows.sum())
            if count:
                wanted = pa.array(rows)
                weights = [flat_values(table["weights"].filter(wanted)) for table in tables.values()]
                yield weights, samples.num_scored[first : first + count], first
            first += count


def _bin_counts(store: Store, names: Sequence[str], samples: ComparedSamples) -> list[Counts]:
    """Tokens of the compared samples in each bin [BINS], for each weighting."""
    stored = [_stored_counts(store, name, samples) for name in names]
    # Each is over the samples of its own weighting, of which the compared ones are a part.
    if all(counts.sum() == samples.num_scored.sum() for counts in stored):
        return stored
    counted = [np.zeros(BINS, dtype=np.int64) for _ in names]
    for weights, _, _ in _row_groups(store, names, samples):
        for counts, column in zip(counted, weights, strict=True):
            counts += np.bincount(bins_of(column), minlength=BINS)
    return counted


def _stored_counts(store: Store, name: str, samples: ComparedSamples) -> Counts:
    counts = np.zeros(BINS, dtype=np.int64)
    for shard in samples.shards:
        file = shard.entries[f"weights/{name}"].totals
        totals = columns_of(store, file, "weight_bins", "weight_counts")
        np.add.at(counts, flat_values(totals["weight_bins"]), flat_values(totals["weight_counts"]))
    return counts
