"""Which samples of a shard are exported, and into which split."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.stages.alignment import AlignedShard
from pear_data.store import Store

_BATCH_ROWS = 65_536


class Where:
    """A predicate over the view `samples`, asked a shard at a time: what it takes depends on a sample alone."""

    def __init__(self, store: Store, predicate: str | None) -> None:
        self._store, self._predicate = store, predicate

    def chosen(self, shard: AlignedShard) -> Collection[str] | None:
        """The ids of a shard's samples that fulfil the predicate; None where there is none, and all do.

        Raises:
            UsageError: it is no predicate over one sample.
            MismatchError: a file that the view reads is not the one that was committed.
            PearError: DuckDB refuses it.
        """
        if self._predicate is None:
            return None
        from pear_data.store.view_sql import viewed_files
        from pear_data.store.views import connect

        store = _one_shard(self._store, shard.name)
        for file in viewed_files(store.manifest):
            self._store.file(file)
        with connect(store) as views:
            query = views.query_where(self._predicate, "sample_id")
            _, batches = views.batches(query, _BATCH_ROWS)
            return {name for batch in batches for name in batch["sample_id"].to_pylist()}


def in_validation(sample_ids: pa.Array, fraction: float) -> npt.NDArray[np.bool_]:
    """Whether each sample is for evaluation: by a hash of its id alone, so that it never changes sides."""
    if not fraction:
        return np.zeros(len(sample_ids), dtype=np.bool_)
    below = int(fraction * 2**64)
    return np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") < below
            for name in sample_ids.to_pylist()
        ),
        dtype=np.bool_,
        count=len(sample_ids),
    )


def _one_shard(store: Store, name: str) -> Store:
    """The store as if it had this shard alone."""
    stages = {
        key: stage.model_copy(update={"shards": [shard for shard in stage.shards if shard.name == name]})
        for key, stage in store.manifest.stages.items()
    }
    return Store(store.path, store.manifest.model_copy(update={"stages": stages}))
