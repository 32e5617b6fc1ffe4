"""Weighting one shard: rows are read, weighted and written at the same time; beside the weights go their sums.

Every file that is read is checked against its sha256 meanwhile, and nothing is published unless all are whole.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.schema import WEIGHT_STATUSES, WEIGHT_SUMMARY, WEIGHT_TOTALS, WEIGHTS
from pear_data.stages.weighing import Weighed, Weigher, is_ok, summary_rows, weight_rows
from pear_data.stages.weight_groups import Group, checked, open_groups
from pear_data.stages.weight_job import Weighting, WeightJob
from pear_data.store import Store
from pear_data.store.columns import flat_values, read_columns
from pear_data.store.manifest import Manifest, Shard
from pear_data.store.shards import parquet_shard, summary_path, summary_shard, totals_path

# Levels whose weights change from token to token.
_UNEVEN = ("token", "dft")


def weigh_shard(job: WeightJob) -> dict[str, Shard]:
    """Weight a shard; its files are in place when this returns. Their entries for the manifest, by stage.

    Raises:
        MismatchError: a file is damaged, or the stages differ in their rows.
        PearError: the disk refused.
    """
    store = Store(job.root, Manifest(created_by=""))
    with contextlib.ExitStack() as files, checked(store, job) as check:
        sources, groups = open_groups(job)
        files.callback(groups.close)
        lanes = [_Lane(job, weighting, sources, files) for weighting in job.weightings]
        first, *others = lanes
        for group in groups:
            weighed = first.take(group)
            for lane in others:
                lane.take(group, weighed if job.shares_ratios else None)
        for lane in others:
            lane.finish(first if job.shares_ratios else None)
        first.finish()
        check()
    return {lane.key: lane.entry(store) for lane in lanes}


def sum_log_ratios(job: WeightJob) -> tuple[float, int]:
    """Sum of the log-ratios of a shard's positive samples that both policies scored, and their tokens.

    Raises MismatchError as `weigh_shard` does.
    """
    assert job.behavior is not None
    with checked(Store(job.root, Manifest(created_by="")), job) as check:
        label = read_columns(job.root / job.corpus_summary.path, ["label"])["label"].to_numpy()
        target, behavior = (
            read_columns(job.root / shard.file.path, ["logprob_sum", "num_scored", "status"])
            for shard in (job.target, job.behavior)
        )
        check()
    used = is_ok(target) & is_ok(behavior) & (label > 0)
    total = float((_sums(target) - _sums(behavior))[used].sum())
    return total, int(target["num_scored"].to_numpy()[used].sum(dtype=np.int64))


def sum_weights(job: WeightJob) -> tuple[float, int]:
    """Sum of the weights of a shard's positive samples by its one weighting, and their tokens; nothing is written.

    Raises MismatchError as `weigh_shard` does.
    """
    (weighting,) = job.weightings
    with checked(Store(job.root, Manifest(created_by="")), job) as check:
        sources, groups = open_groups(job)
        weigher = Weigher(job, weighting, sources)
        with contextlib.closing(groups):
            for group in groups:
                weigher.weigh(group)
        check()
    totals = weigher.totals.table()
    return float(flat_values(totals["weight_sum"]).sum()), int(flat_values(totals["tokens"]).sum())


class _Lane:
    """One weighting's way through a shard: row groups are weighted here and written in a thread of their own."""

    def __init__(
        self, job: WeightJob, weighting: Weighting, sources: list[str], files: contextlib.ExitStack
    ) -> None:
        self.key = weighting.key
        self._job = job
        self._weigher = Weigher(job, weighting, sources)
        self._part = job.root / self.key / f"{job.name}.parquet"
        self._summary = summary_path(job.root, self.key, job.name)
        self._totals = totals_path(job.root, self.key, job.name)
        in_runs = weighting.settings.level not in _UNEVEN
        self._writer = files.enter_context(parquet_shard(self._part, WEIGHTS, in_runs=in_runs))
        self._summaries = files.enter_context(summary_shard(self._summary, WEIGHT_SUMMARY))
        self._totals_writer = files.enter_context(parquet_shard(self._totals, WEIGHT_TOTALS))
        self._thread = files.enter_context(ThreadPoolExecutor(1))
        self._writing: Future[None] | None = None
        self._statuses = np.zeros(len(WEIGHT_STATUSES), np.int64)
        self._weighted = 0

    def take(self, group: Group, alike: Weighed | None = None) -> Weighed:
        """Weight a row group as `Weigher.weigh` does, and begin to write it when the one before is written."""
        weighed = self._weigher.weigh(group, alike)
        self._written()
        self._writing = self._thread.submit(self._writer.write, weight_rows(group, weighed))
        self._summaries.add(summary_rows(group, weighed))
        self._statuses += np.bincount(weighed.status, minlength=len(WEIGHT_STATUSES))
        self._weighted += int(weighed.lengths[weighed.is_ok[weighed.scored]].sum())
        return weighed

    def finish(self, alike: _Lane | None = None) -> None:
        """Write what is left; `alike` has measured the log-ratios."""
        self._written()
        if alike is not None:
            self._weigher.totals.take_ratios(alike._weigher.totals)
        self._totals_writer.write(self._weigher.totals.table())

    def entry(self, store: Store) -> Shard:
        """The shard's entry, once its files are in place."""
        return Shard(
            name=self._job.name,
            file=store.entry_of(self._part),
            summary=store.entry_of(self._summary),
            totals=store.entry_of(self._totals),
            rows=int(self._statuses.sum()),
            num_tokens=self._weighted,
            num_scored=self._weighted,
            counts={
                name: int(count) for name, count in zip(WEIGHT_STATUSES, self._statuses, strict=True) if count
            },
            inputs=self._job.inputs,
        )

    def _written(self) -> None:
        if self._writing is not None:
            self._writing.result()


def _sums(scores: pa.Table) -> npt.NDArray[np.float64]:
    return np.asarray(scores["logprob_sum"].fill_null(0).to_numpy(), dtype=np.float64)
