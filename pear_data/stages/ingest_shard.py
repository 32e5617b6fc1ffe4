"""Writing one shard of the corpus, and beside it the rows that were rejected on the way."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pear_data.corpus.duplicates import duplicate_error
from pear_data.corpus.records import Rejected
from pear_data.schema import CORPUS, CORPUS_SUMMARY, INPUT_IDS, LOSS_MASK, QUARANTINE
from pear_data.stages.ingest_batches import Batch, Sample
from pear_data.store import Store
from pear_data.store.columns import list_column
from pear_data.store.manifest import Cursor, Shard
from pear_data.store.shards import GroupWriter, parquet_shard, summary_path, summary_shard

GROUP_TOKENS = 1_000_000
ROW_BYTES = 512  # what a rejected row takes besides its raw bytes
GROUP_BYTES = 64 << 20  # of rows, kept or rejected: what bounds memory where these are large and tokens few


@contextlib.contextmanager
def shard_writer(store: Store, name: str) -> Iterator[ShardWriter]:
    """A shard to add batches to; its files are in place when the block ends well, and nowhere when it does not.

    Raises:
        PearError: the disk refused.
    """
    with contextlib.ExitStack() as files:
        writer = ShardWriter(store, name, files)
        yield writer
        writer.flush()


class ShardWriter:
    """Gathers batches into row groups; use `shard_writer`."""

    def __init__(self, store: Store, name: str, files: contextlib.ExitStack) -> None:
        self.num_samples = 0
        self.num_tokens = 0
        self.num_scored = 0
        self.quarantined = 0
        self.first_rejected = "no row at all"
        self.places: dict[str, str] = {}  # where each sample id comes from
        self._counts: Counter[str] = Counter()
        self._cursor: Cursor | None = None
        self._store, self._name, self._files = store, name, files
        self._part = store.path / "corpus" / f"{name}.parquet"
        self._summary = summary_path(store.path, "corpus", name)
        self._quarantine = store.path / "quarantine" / f"corpus-{name}.parquet"
        self._writer = files.enter_context(parquet_shard(self._part, CORPUS))
        self._summary_writer = files.enter_context(summary_shard(self._summary, CORPUS_SUMMARY))
        self._quarantine_writer: GroupWriter | None = None
        self._samples: list[Sample] = []
        self._rejected: list[tuple[str, Rejected]] = []
        self._held_tokens = self._held_bytes = 0

    def add(self, batch: Batch) -> None:
        """Take in a batch.

        Raises:
            PearError: it repeats a sample id.
        """
        for sample in batch.samples:
            if sample.sample_id in self.places:
                raise duplicate_error(sample.sample_id, self.places[sample.sample_id], sample.place)
            self.places[sample.sample_id] = sample.place
        if batch.rejected and not self.quarantined:
            name, row = batch.rejected[0]
            self.first_rejected = f"{name}:{row.number}: {row.reason}"
        self._samples += batch.samples
        self._rejected += batch.rejected
        self._counts += batch.counts
        self._cursor = batch.cursor
        self.num_samples += len(batch.samples)
        self.num_tokens += batch.num_tokens
        self.quarantined += len(batch.rejected)
        self._held_tokens += batch.num_tokens
        self._held_bytes += sum(len(sample.record) for sample in batch.samples)
        self._held_bytes += sum(len(row.raw) + ROW_BYTES for _, row in batch.rejected)
        if self._held_tokens >= GROUP_TOKENS or self._held_bytes >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered as a row group of the shard and one of its quarantine."""
        if self._samples:
            rows = _corpus_rows(self._samples)
            self._writer.write(rows)
            self._summary_writer.add(rows.select(CORPUS_SUMMARY.names))
            self.num_scored += sum(int(sample.loss_mask.sum()) for sample in self._samples)
            self._samples = []
        if self._rejected:
            if self._quarantine_writer is None:
                self._quarantine_writer = self._files.enter_context(
                    parquet_shard(self._quarantine, QUARANTINE)
                )
            self._quarantine_writer.write(_quarantine_rows(self._rejected))
            self._rejected = []
        self._held_tokens = self._held_bytes = 0

    def entry(self) -> Shard:
        """The manifest's entry of the shard, once its files are in place."""
        return Shard(
            name=self._name,
            file=self._store.entry_of(self._part),
            summary=self._store.entry_of(self._summary),
            rows=self.num_samples,
            num_tokens=self.num_tokens,
            num_scored=self.num_scored,
            counts=dict(self._counts),
            cursor=self._cursor,
            quarantine=self._store.entry_of(self._quarantine) if self.quarantined else None,
            quarantined=self.quarantined,
        )


def _corpus_rows(samples: list[Sample]) -> pa.Table:
    lengths = np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)
    masks = [sample.loss_mask for sample in samples]
    columns = [
        pa.array([sample.sample_id for sample in samples], pa.string()),
        pa.array([sample.source for sample in samples], pa.string()),
        pa.array([sample.label for sample in samples], pa.int8()),
        list_column(np.concatenate([sample.input_ids for sample in samples]), lengths, INPUT_IDS),
        list_column(np.concatenate(masks), lengths, LOSS_MASK),
        pa.array(lengths, pa.int32()),
        pa.array([int(mask.sum()) for mask in masks], pa.int32()),
        pa.array([sample.record for sample in samples], pa.string()),
    ]
    return pa.table(columns, schema=CORPUS)


def _quarantine_rows(rows: list[tuple[str, Rejected]]) -> pa.Table:
    columns = [
        pa.array([name for name, _ in rows], pa.string()),
        pa.array([row.number for _, row in rows], pa.int64()),
        pa.array([row.reason for _, row in rows], pa.string()),
        pa.array([row.raw for _, row in rows], pa.binary()),
    ]
    return pa.table(columns, schema=QUARANTINE)
