"""Which samples of a shard are exported, and into which split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.stages.alignment import AlignedShard
from pear_data.store import Store
from pear_data.store.manifest import CORPUS

_BATCH_ROWS = 65_536
_TURN = re.compile(r"#\d+\Z")


class Where:
    """A predicate over the view `samples`, asked a shard at a time: what it takes depends on a sample alone."""

    def __init__(self, store: Store, weights: str, predicate: str | None) -> None:
        self._store, self._weights, self._predicate = store, weights, predicate

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
            query = views.query_where(_select(store, self._weights), self._predicate)
            _, batches = views.batches(query, _BATCH_ROWS)
            return {name for batch in batches for name in batch["sample_id"].to_pylist()}


def _select(store: Store, weights: str) -> str:
    """Sample ids of a view `samples` whose columns that name no weighting are those of `weights`."""
    from pear_data.store.joined_views import SUMMARY
    from pear_data.store.shown import default_weighting
    from pear_data.store.sql_text import quoted

    if default_weighting(store.manifest) == weights:
        return "SELECT sample_id FROM samples"
    own = ", ".join(f"{quoted(f'{name}_{weights}')} AS {name}" for name in (*SUMMARY, "weight_status"))
    return f"SELECT sample_id FROM (SELECT * REPLACE ({own}) FROM samples) AS samples"


def in_validation(store: Store, sample_ids: pa.Array, fraction: float) -> npt.NDArray[np.bool_]:
    """Whether each sample is for evaluation: by a hash of its id alone, so that it never changes sides.

    Samples that are turns of one conversation (`ingest --turns all`) fall to one side.
    """
    if not fraction:
        return np.zeros(len(sample_ids), dtype=np.bool_)
    names = sample_ids.to_pylist()
    if store.stage(CORPUS).settings.get("turns") == "all":
        names = [_TURN.sub("", name) for name in names]
    below = int(fraction * 2**64)
    places = (int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") for name in names)
    return np.fromiter((place < below for place in places), dtype=np.bool_, count=len(names))


def _one_shard(store: Store, name: str) -> Store:
    """The store as if it had this shard alone."""
    stages = {
        key: stage.model_copy(update={"shards": [shard for shard in stage.shards if shard.name == name]})
        for key, stage in store.manifest.stages.items()
    }
    return Store(store.path, store.manifest.model_copy(update={"stages": stages}))
