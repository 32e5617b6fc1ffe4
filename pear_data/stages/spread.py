"""A few rows of a corpus, spread over its sample lengths: the same ones each time, found without holding the corpus."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_SEED = b"pear-data"


@dataclass(frozen=True, slots=True)
class GroupLengths:
    """What choosing needs to know of one row group (number `group` of the shard, from 0)."""

    shard: str
    group: int
    sample_ids: pa.ChunkedArray  # [n]
    num_tokens: npt.NDArray[np.int32]  # [n]
    eligible: npt.NDArray[np.bool_]  # [n]


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a chosen row is; ordered by the hash of its sample id, which is as good as at random."""

    hashed: bytes
    shard: str
    group: int
    row: int


def spread_rows(read: Callable[[], Iterator[GroupLengths]], count: int) -> list[Place]:
    """`count` eligible rows at even quantiles of num_tokens (all of them where there are no more), in hash order.

    Of rows of one length those with the least hash of their sample id are taken. `read` is called twice; memory is
    bounded by a row group, the longest length and `count`.
    """
    quota = _quota(_length_counts(read()), count)
    kept: defaultdict[int, list[Place]] = defaultdict(list)
    for lengths in read():
        wanted = lengths.eligible & (quota[lengths.num_tokens] > 0)
        rows = np.flatnonzero(wanted)
        sample_ids = lengths.sample_ids.take(pa.array(rows)).to_pylist()
        for row, sample_id in zip(rows.tolist(), sample_ids, strict=True):
            length = int(lengths.num_tokens[row])
            kept[length].append(Place(_hash(sample_id), lengths.shard, lengths.group, row))
        for length in set(lengths.num_tokens[rows].tolist()):
            kept[length] = sorted(kept[length])[: quota[length]]
    return sorted(place for places in kept.values() for place in places)


def by_group(places: list[Place]) -> dict[tuple[str, int], npt.NDArray[np.int64]]:
    """Rows (ascending) of each (shard, row group) that holds any."""
    found: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for place in places:
        found[place.shard, place.group].append(place.row)
    return {key: np.array(sorted(rows), dtype=np.int64) for key, rows in found.items()}


def _length_counts(groups: Iterator[GroupLengths]) -> npt.NDArray[np.int64]:
    """Eligible rows of each length, indexed by length up to the longest of all rows."""
    counts = np.zeros(1, dtype=np.int64)
    for lengths in groups:
        size = max(len(counts), int(lengths.num_tokens.max(initial=0)) + 1)
        counts = np.pad(counts, (0, size - len(counts)))
        counts += np.bincount(lengths.num_tokens[lengths.eligible], minlength=size)
    return counts


def _quota(counts: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Rows to take of each length: those that the midpoints of `count` equal parts of the sorted rows fall on."""
    total = int(counts.sum())
    if count >= total:
        return counts
    ranks = ((np.arange(count) + 0.5) * total / count).astype(np.int64)
    lengths = np.searchsorted(np.cumsum(counts), ranks, side="right")
    return np.bincount(lengths, minlength=len(counts)).astype(np.int64)


def _hash(sample_id: str) -> bytes:
    return hashlib.blake2b(sample_id.encode(), digest_size=8, key=_SEED).digest()
