"""The samples that several weightings can be compared on, and their mean weights, from the summaries alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pear_data.errors import MismatchError
from pear_data.schema import STATUS_OK
from pear_data.stages.alignment import AlignedShard
from pear_data.store import Store
from pear_data.store.manifest import CORPUS, FileEntry

Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ComparedSamples:
    """n samples with label 1 and status ok in each of k weightings, in the corpus's order."""

    shards: Sequence[AlignedShard]
    kept: Sequence[Bools]  # which rows of each shard they are
    weight_means: npt.NDArray[np.float32]  # [k, n]
    num_scored: Counts  # [n]

    @property
    def shard_offsets(self) -> Counts:
        """Where the samples of each shard start, [shards + 1]."""
        counts = [int(rows.sum()) for rows in self.kept]
        return np.cumsum([0, *counts], dtype=np.int64)

    def place_of(self, sample: int) -> tuple[int, int]:
        """The shard of a sample, and its row there."""
        offsets = self.shard_offsets
        shard = int(np.searchsorted(offsets, sample, side="right")) - 1
        return shard, int(np.flatnonzero(self.kept[shard])[sample - offsets[shard]])


def compared_samples(store: Store, names: Sequence[str], shards: Sequence[AlignedShard]) -> ComparedSamples:
    """Read the summaries of the corpus and of the weightings `names`, shard by shard.

    Raises:
        MismatchError: a summary differs from its manifest, or two of them in their rows.
    """
    parts = [_of_shard(store, names, shard) for shard in shards]
    no_means = np.empty((len(names), 0), dtype=np.float32)
    return ComparedSamples(
        shards,
        [kept for kept, _, _ in parts],
        np.concatenate([no_means, *(means for _, means, _ in parts)], axis=1),
        np.concatenate([np.empty(0, dtype=np.int64), *(lengths for _, _, lengths in parts)]),
    )


def columns_of(store: Store, file: FileEntry | None, *columns: str) -> pa.Table:
    """All rows of a file of one shard, a few columns."""
    assert file is not None  # `statistics` refuses weights without summaries
    return pq.read_table(store.file(file), columns=list(columns))


def corpus_rows(store: Store, shard: AlignedShard, *columns: str) -> pa.Table:
    """Columns that the corpus's summary has, of every row of a shard."""
    entry = shard.entries[CORPUS]
    return columns_of(store, entry.summary or entry.file, *columns)


def _of_shard(
    store: Store, names: Sequence[str], shard: AlignedShard
) -> tuple[Bools, npt.NDArray[np.float32], Counts]:
    corpus = corpus_rows(store, shard, "sample_id", "label")
    columns = ("sample_id", "num_scored", "weight_sum", "status")
    tables = [columns_of(store, shard.entries[f"weights/{name}"].summary, *columns) for name in names]
    for name, table in zip(names, tables, strict=True):
        if not table["sample_id"].equals(corpus["sample_id"]):
            raise MismatchError(
                f"{shard.name}: the summary of weights/{name} has other rows than the corpus: run `pear-data verify`"
            )
    kept: Bools = corpus["label"].to_numpy() > 0
    for table in tables:
        kept &= np.asarray(table["status"].to_numpy() == STATUS_OK, dtype=np.bool_)
    lengths = tables[0]["num_scored"].to_numpy()[kept].astype(np.int64)
    sums = np.stack([table["weight_sum"].to_numpy()[kept] for table in tables])
    return kept, (sums / lengths).astype(np.float32), lengths


def pairs(count: int) -> list[tuple[int, int]]:
    """Every two of `count` weightings."""
    return list(itertools.combinations(range(count), 2))
