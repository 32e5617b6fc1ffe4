"""Weighting one shard: rows are read, weighted and written at the same time; beside the weights go their sums.

What travels to a worker is a `WeightJob`; what comes back is the shard's entry for the manifest. Every file that is
read is checked against its sha256 meanwhile, and nothing is published unless all are whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pear_data import kernels
from pear_data.config import BASELINES, WeightSettings
from pear_data.errors import MismatchError
from pear_data.schema import (
    FLOATS,
    STATUS_DROPPED,
    STATUS_OK,
    STATUS_UNSCORED,
    WEIGHT_SUMMARY,
    WEIGHT_TOTALS,
    WEIGHTS,
)
from pear_data.stages.source_totals import SourceTotals
from pear_data.stages.spans import compared_spans
from pear_data.stages.text_blocks import BlockCutter, open_block_cutter
from pear_data.store import Store
from pear_data.store.columns import flat_values, list_column, list_lengths
from pear_data.store.manifest import CORPUS, FileEntry, Manifest, Shard
from pear_data.store.shards import parquet_shard, summary_path, summary_shard, totals_path, write_group
from pear_data.weighting import LEVELS, SampleOptions, SampleSums, weigh

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Item = TypeVar("Item")
READ_BUFFER = 1 << 20

_SAMPLE_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("log_ratio_sum", "sums", kernels.LOG_RATIO_SUM),
    ("weight_sum", "sums", kernels.WEIGHT),
    ("weight_square_sum", "sums", kernels.WEIGHT_SQUARE),
    ("weight_min", "sums", kernels.WEIGHT_MIN),
    ("weight_max", "sums", kernels.WEIGHT_MAX),
    ("clipped_low", "counts", kernels.CLIPPED_LOW),
    ("clipped_high", "counts", kernels.CLIPPED_HIGH),
    ("saturated_low", "counts", kernels.SATURATED_LOW),
    ("saturated_high", "counts", kernels.SATURATED_HIGH),
)
_OF_LOG_RATIOS = ("log_ratio_sum", "clipped_low", "clipped_high")


@dataclass(frozen=True, slots=True)
class WeightJob:
    """One shard to weight, with all that a process which has seen nothing else needs."""

    root: Path
    name: str
    settings: WeightSettings
    corpus: Shard
    target: Shard
    behavior: Shard | None  # None where a baseline is made without
    center: float = 0.0  # subtracted from every log-ratio
    scale: float = 1.0  # factor of every weight
    manifest: Manifest | None = None  # where blocks are pieces of text

    @property
    def key(self) -> str:
        """The stage."""
        return f"weights/{self.settings.stored_name}"


@dataclass(frozen=True, slots=True)
class _Group:
    """One row group of both policies, and its rows of the corpus."""

    samples: pa.Table  # sample_id, source (a code), label
    target: pa.Table
    behavior: pa.Table | None
    text: pa.Table | None  # input_ids and loss_mask


@dataclass(frozen=True, slots=True)
class _Weighed:
    """Weights of the scored rows of a row group, and what was found of them."""

    scored: npt.NDArray[np.bool_]  # [rows]
    lengths: Counts  # [n]
    weights: Floats  # [N]
    found: SampleSums
    status: npt.NDArray[np.object_]  # [rows]


def weigh_shard(job: WeightJob) -> Shard:
    """Weight a shard; its files are in place when this returns.

    Raises:
        MismatchError: a file is damaged, or the stages differ in their rows.
        PearError: the disk refused.
    """
    store = Store(job.root, Manifest(created_by=""))
    final = job.root / job.key / f"{job.name}.parquet"
    summary, totals_file = summary_path(job.root, job.key, job.name), totals_path(job.root, job.key, job.name)
    counts = {STATUS_OK: 0, STATUS_UNSCORED: 0, STATUS_DROPPED: 0}
    rows = weighted = 0
    with (
        _checked(store, job) as check,
        parquet_shard(final, WEIGHTS) as writer,
        summary_shard(summary, WEIGHT_SUMMARY) as summaries,
        parquet_shard(totals_file, WEIGHT_TOTALS) as totals_writer,
        _writing(writer) as write,
    ):
        sources, groups = _groups(job)
        totals = SourceTotals(sources, job.behavior is not None)
        weigher = _Weigher(job, sources, totals)
        with contextlib.closing(groups):
            for group in groups:
                weighed = weigher.weigh(group)
                write(_weight_rows(group, weighed))
                summaries.add(_summary_rows(group, weighed, job.behavior is not None))
                for status in counts:
                    counts[status] += int((weighed.status == status).sum())
                rows += len(weighed.scored)
                weighted += int(weighed.lengths[weighed.status[weighed.scored] == STATUS_OK].sum())
        write_group(totals_writer, totals.table())
        check()
    return Shard(
        name=job.name,
        file=store.entry_of(final),
        summary=store.entry_of(summary),
        totals=store.entry_of(totals_file),
        rows=rows,
        num_tokens=weighted,
        num_scored=weighted,
        counts={status: count for status, count in counts.items() if count},
        inputs=_inputs(job),
    )


def sum_log_ratios(job: WeightJob) -> tuple[float, int]:
    """Sum of the log-ratios of a shard's positive samples that both policies scored, and their tokens.

    Raises MismatchError as `weigh_shard` does.
    """
    assert job.behavior is not None
    store = Store(job.root, Manifest(created_by=""))
    total, tokens = 0.0, 0
    with _checked(store, job) as check:
        label = pq.read_table(job.root / _summary_of(job.corpus).path, columns=["label"])["label"].to_numpy()
        target, behavior = (
            pq.read_table(job.root / shard.file.path, columns=["logprob_sum", "num_scored", "status"])
            for shard in (job.target, job.behavior)
        )
        used = _is_ok(target) & _is_ok(behavior) & (label > 0)
        total = float((_sums(target) - _sums(behavior))[used].sum())
        tokens = int(target["num_scored"].to_numpy()[used].sum(dtype=np.int64))
        check()
    return total, tokens


def sum_weights(job: WeightJob) -> tuple[float, int]:
    """Sum of the weights of a shard's positive samples, and their tokens; nothing is written.

    Raises MismatchError as `weigh_shard` does.
    """
    store = Store(job.root, Manifest(created_by=""))
    with _checked(store, job) as check:
        sources, groups = _groups(job)
        totals = SourceTotals(sources, job.behavior is not None)
        weigher = _Weigher(job, sources, totals)
        with contextlib.closing(groups):
            for group in groups:
                weigher.weigh(group)
        check()
    table = totals.table()
    return float(flat_values(table["weight_sum"]).sum()), int(flat_values(table["tokens"]).sum())


class _Weigher:
    """Weights row groups of one shard, adding their sums to its totals."""

    def __init__(self, job: WeightJob, sources: list[str], totals: SourceTotals) -> None:
        self._job, self._totals = job, totals
        settings = job.settings
        own = [settings.per_source.get(source) for source in sources]
        self._log_gamma = np.log([s.gamma if s and s.gamma else settings.gamma for s in own])
        self._ratio_bounds = np.array([(s and s.clip_log_ratio) or settings.clip_log_ratio for s in own])
        self._weight_bounds = np.array([(s and s.clip_log_weight) or settings.clip_log_weight for s in own])
        self._cutter: BlockCutter | None = None
        if job.manifest is not None:
            self._cutter = open_block_cutter(Store(job.root, job.manifest), settings)

    def weigh(self, group: _Group) -> _Weighed:
        """Weight a row group."""
        settings = self._job.settings
        scored = _is_ok(group.target)
        if group.behavior is not None:
            scored &= _is_ok(group.behavior)
        negative = group.samples["label"].to_numpy() < 0
        status = np.full(len(scored), STATUS_UNSCORED, dtype=object)
        status[scored] = STATUS_OK
        if not settings.negative_scale:
            status[scored & negative] = STATUS_DROPPED
        codes = group.samples["source"].to_numpy().astype(np.int64)
        self._totals.count_rows(codes, status, negative)
        lengths = group.target["num_scored"].to_numpy()[scored].astype(np.int64)
        weights = np.empty(int(lengths.sum()), dtype=np.float32)
        found = SampleSums.empty(len(lengths))
        if len(lengths):
            self._weigh_rows(group, scored, codes[scored], negative[scored], lengths, weights, found)
        return _Weighed(scored, lengths, weights, found, status)

    def _weigh_rows(
        self,
        group: _Group,
        scored: npt.NDArray[np.bool_],
        codes: Counts,
        negative: npt.NDArray[np.bool_],
        lengths: Counts,
        weights: Floats,
        found: SampleSums,
    ) -> None:
        target = _of_rows(group.target, scored)
        behavior = target if group.behavior is None else _of_rows(group.behavior, scored)
        spans = None if group.behavior is None else compared_spans(target, behavior)
        blocks = None
        if self._cutter is not None and group.text is not None:
            text = _of_rows(group.text, scored)
            tokens = list_lengths(text["input_ids"])
            blocks = self._cutter.block_lengths(
                flat_values(text["input_ids"]), flat_values(text["loss_mask"]), tokens
            )
        flat_target, flat_behavior = flat_values(target["logprobs"]), flat_values(behavior["logprobs"])
        ends = np.concatenate(([0], np.cumsum(lengths)))
        for run, slots, sums in self._totals.runs(codes):
            first, last = ends[run.start], ends[min(run.stop, len(lengths))]
            weigh(
                flat_target[first:last],
                flat_behavior[first:last],
                lengths[run],
                self._options(codes[run], negative[run]),
                np.where(negative[run], -1, slots),
                sums,
                weights[first:last],
                found.between(run.start, run.stop),
                span_lengths=_pieces(spans, first, last),
                block_lengths=_pieces(blocks, first, last),
            )
        if not np.isfinite(found.sums[:, : kernels.LOG_RATIO_SUM]).all():
            raise MismatchError(f"{self._job.name}: log-probs are not all finite: run `pear-data verify`")
        positive = ~negative
        part = SampleSums(found.counts[positive], found.sums[positive])
        self._totals.add_samples(codes[positive], lengths[positive], part)

    def _options(self, codes: Counts, negative: npt.NDArray[np.bool_]) -> SampleOptions:
        """How samples are weighted; negatives get their sequence-level weight times -lambda (3.6)."""
        settings, job = self._job.settings, self._job
        is_baseline = settings.level in BASELINES
        levels = np.full(len(codes), LEVELS.index(settings.level), dtype=np.int8)
        if not is_baseline:
            levels[negative] = LEVELS.index("sequence")
        scale = np.full(len(codes), job.scale)
        scale[negative] *= -settings.negative_scale if settings.negative_scale else 0.0
        unbounded = np.tile((-np.inf, np.inf), (len(codes), 1))
        return SampleOptions(
            levels=levels,
            block_size=settings.block_size,
            log_gamma=self._log_gamma[codes],
            clip_log_ratio=self._ratio_bounds[codes],
            clip_log_weight=unbounded if is_baseline else self._weight_bounds[codes],
            center=np.full(len(codes), job.center),
            center_samples=settings.center == "sample",
            scale=scale,
            scale_samples=settings.normalize == "sample",
        )


def _groups(job: WeightJob) -> tuple[list[str], Generator[_Group, None, None]]:
    """The sources of a shard, by code, and its row groups, each read while the one before is in use."""
    corpus = pq.read_table(job.root / _summary_of(job.corpus).path, columns=["sample_id", "source", "label"])
    named = corpus["source"].combine_chunks().dictionary_encode()
    samples = corpus.set_column(1, "source", named.indices)
    return named.dictionary.to_pylist(), _aligned(job, samples)


def _aligned(job: WeightJob, samples: pa.Table) -> Generator[_Group, None, None]:
    wanted = ["sample_id", "logprobs", "span_tokens", "num_scored", "status"]
    files: dict[str, tuple[FileEntry, list[str]]] = {"target": (job.target.file, wanted)}
    if job.behavior is not None:
        files["behavior"] = (job.behavior.file, wanted)
    if job.manifest is not None:
        files["text"] = (job.corpus.file, ["sample_id", "input_ids", "loss_mask"])
    first = 0
    with contextlib.ExitStack() as stack:
        readers = {
            role: stack.enter_context(_one_ahead(_row_groups(job.root / entry.path, columns)))
            for role, (entry, columns) in files.items()
        }
        try:
            for tables in zip(*readers.values(), strict=True):
                group = dict(zip(readers, tables, strict=True))
                rows = samples.slice(first, len(group["target"]))
                first += len(rows)
                if any(not table["sample_id"].equals(rows["sample_id"]) for table in tables):
                    raise MismatchError(
                        f"{job.name}: the stages differ in their rows: run `pear-data verify`"
                    )
                yield _Group(rows, group["target"], group.get("behavior"), group.get("text"))
        except ValueError:
            raise MismatchError(f"{job.name}: stages differ in row groups: run `pear-data verify`") from None
    if first != len(samples):
        raise MismatchError(f"{job.name}: the stages differ in their rows: run `pear-data verify`")


def _row_groups(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BUFFER) as parquet:
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group, columns=columns, use_threads=False)


@contextlib.contextmanager
def _one_ahead(items: Iterator[Item]) -> Iterator[Iterator[Item]]:
    """The same, each made in another thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:

        def made() -> Iterator[Item]:
            following = thread.submit(next, items, None)
            while (item := following.result()) is not None:
                following = thread.submit(next, items, None)
                yield item

        yield made()


@contextlib.contextmanager
def _writing(writer: pq.ParquetWriter) -> Iterator[Callable[[pa.Table], None]]:
    """Write tables in another thread, each while the next is made."""
    with ThreadPoolExecutor(1) as thread:
        pending: list[Future[None]] = []

        def write(table: pa.Table) -> None:
            if pending:
                pending.pop().result()
            pending.append(thread.submit(write_group, writer, table))

        yield write
        if pending:
            pending.pop().result()


@contextlib.contextmanager
def _checked(store: Store, job: WeightJob) -> Iterator[Callable[[], None]]:
    """Compare every file that is read with its sha256, beside the reading; call what this yields to have the result."""
    entries = [_summary_of(job.corpus), job.target.file]
    entries += [job.behavior.file] if job.behavior else []
    entries += [job.corpus.file] if job.manifest else []
    with ThreadPoolExecutor(1) as thread:
        checks = [thread.submit(store.file, entry) for entry in entries]

        def check() -> None:
            for done in checks:
                done.result()

        try:
            yield check
        except (pa.ArrowException, OSError):
            check()  # what cannot be read is damaged, if anything is
            raise


def _weight_rows(group: _Group, weighed: _Weighed) -> pa.Table:
    lengths = np.zeros(len(weighed.scored), dtype=np.int64)
    lengths[weighed.scored] = weighed.lengths
    columns = [
        group.target["sample_id"],
        list_column(weighed.weights, lengths, FLOATS, weighed.scored),
        group.target["num_scored"],
        pa.array(weighed.status, type=pa.string()),
    ]
    return pa.table(columns, schema=WEIGHTS)


def _summary_rows(group: _Group, weighed: _Weighed, has_behavior: bool) -> pa.Table:
    columns: dict[str, Any] = {
        "sample_id": group.target["sample_id"],
        "num_scored": group.target["num_scored"],
        "status": pa.array(weighed.status, type=pa.string()),
    }
    for name, kind, index in _SAMPLE_COLUMNS:
        values = getattr(weighed.found, kind)[:, index]
        known = (
            weighed.scored if has_behavior or name not in _OF_LOG_RATIOS else np.zeros_like(weighed.scored)
        )
        columns[name] = _scatter(values, weighed.scored, known, WEIGHT_SUMMARY.field(name).type)
    return pa.table([columns[name] for name in WEIGHT_SUMMARY.names], schema=WEIGHT_SUMMARY)


def _scatter(
    values: npt.NDArray[Any], rows: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_], kind: pa.DataType
) -> pa.Array:
    """A column with `values` at the true `rows`, null where not `known`."""
    column = np.zeros(len(rows), dtype=values.dtype)
    column[rows] = values
    return pa.array(column, mask=~known).cast(kind)


def _pieces(lengths: Counts | None, first: int, last: int) -> Counts | None:
    """Those of pieces that lie between two tokens, at which pieces end."""
    if lengths is None:
        return None
    ends = np.cumsum(lengths)
    return lengths[np.searchsorted(ends, first, side="right") : np.searchsorted(ends, last, side="right")]


def _of_rows(table: pa.Table, rows: npt.NDArray[np.bool_]) -> pa.Table:
    return table if rows.all() else table.filter(pa.array(rows))


def _is_ok(scores: pa.Table) -> npt.NDArray[np.bool_]:
    return np.asarray(scores["status"].to_numpy(zero_copy_only=False) == STATUS_OK, dtype=np.bool_)


def _sums(scores: pa.Table) -> npt.NDArray[np.float64]:
    return np.asarray(scores["logprob_sum"].fill_null(0).to_numpy(), dtype=np.float64)


def _summary_of(corpus: Shard) -> FileEntry:
    """Where source and label are read; corpora of the first format have them among their tokens only."""
    return corpus.summary or corpus.file


def _inputs(job: WeightJob) -> dict[str, str]:
    inputs = {CORPUS: job.corpus.file.sha256, f"scores/{job.settings.target}": job.target.file.sha256}
    if job.behavior is not None:
        inputs[f"scores/{job.settings.behavior}"] = job.behavior.file.sha256
    return inputs
