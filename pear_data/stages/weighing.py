"""Weights of one row group at a time, and the rows of a shard's files that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pear_data import kernels
from pear_data.config import BASELINES
from pear_data.errors import MismatchError
from pear_data.schema import FLOATS, STATUS_OK, WEIGHT_STATUSES, WEIGHT_SUMMARY, WEIGHTS
from pear_data.stages.source_totals import SourceTotals
from pear_data.stages.spans import compared_spans
from pear_data.stages.weight_groups import Group
from pear_data.stages.weight_job import Weighting, WeightJob
from pear_data.store.columns import flat_values, list_column, list_lengths
from pear_data.weighting import LEVELS, SampleOptions, SampleSums, log_ratios, weigh

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

_OK, _UNSCORED, _DROPPED = map(np.int8, range(len(WEIGHT_STATUSES)))
_STATUSES = pa.array(WEIGHT_STATUSES)
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
class Weighed:
    """Weights of the scored rows of a row group, and what was found of them."""

    scored: npt.NDArray[np.bool_]  # [rows]
    lengths: Counts  # [n]
    weights: Floats  # [N]
    found: SampleSums
    status: npt.NDArray[np.int8]  # [rows], index into WEIGHT_STATUSES

    @property
    def is_ok(self) -> npt.NDArray[np.bool_]:
        """[rows] whether each has the status ok."""
        return np.equal(self.status, _OK)


class Weigher:
    """Weights the row groups of one shard by one weighting; `totals` are those of the groups so far."""

    def __init__(self, job: WeightJob, weighting: Weighting, sources: list[str]) -> None:
        self.totals = SourceTotals(sources, job.behavior is not None)
        self._name, self._weighting = job.name, weighting
        settings = weighting.settings
        own = [settings.per_source.get(source) for source in sources]
        self._log_gamma = np.log([s.gamma if s and s.gamma else settings.gamma for s in own])
        self._ratio_bounds = np.array([(s and s.clip_log_ratio) or settings.clip_log_ratio for s in own])
        self._weight_bounds = np.array([(s and s.clip_log_weight) or settings.clip_log_weight for s in own])

    def weigh(self, group: Group, alike: Weighed | None = None) -> Weighed:
        """Weight a row group; `alike` is the same of a weighting that meets the same log-ratios and clips."""
        settings = self._weighting.settings
        scored = is_ok(group.target)
        if group.behavior is not None:
            scored &= is_ok(group.behavior)
        negative = group.samples["label"].to_numpy() < 0
        status = np.where(scored, _OK, _UNSCORED)
        if not settings.negative_scale:
            status[scored & negative] = _DROPPED
        codes = group.samples["source"].to_numpy().astype(np.int64)
        self.totals.count_rows(codes, status, negative)
        lengths = group.target["num_scored"].to_numpy()[scored].astype(np.int64)
        weights = np.empty(int(lengths.sum()), dtype=np.float32)
        found = SampleSums.empty(len(lengths))
        if len(lengths):
            ratios = None if alike is None else alike.found
            self._weigh_rows(group, scored, codes[scored], negative[scored], lengths, weights, found, ratios)
        return Weighed(scored, lengths, weights, found, status)

    def _weigh_rows(
        self,
        group: Group,
        scored: npt.NDArray[np.bool_],
        codes: Counts,
        negative: npt.NDArray[np.bool_],
        lengths: Counts,
        weights: Floats,
        found: SampleSums,
        ratios: SampleSums | None,
    ) -> None:
        target = _of_rows(group.target, scored)
        behavior = target if group.behavior is None else _of_rows(group.behavior, scored)
        spans = None if group.behavior is None else compared_spans(target, behavior)
        blocks = None
        cutter = self._weighting.cutter
        if cutter is not None:
            assert group.text is not None
            text = _of_rows(group.text, scored)
            tokens = list_lengths(text["input_ids"])
            blocks = cutter.block_lengths(
                flat_values(text["input_ids"]), flat_values(text["loss_mask"]), tokens
            )
        flat_target, flat_behavior = flat_values(target["logprobs"]), flat_values(behavior["logprobs"])
        slots, sums = self.totals.sums_of(codes)
        weigh(
            flat_target,
            flat_behavior,
            lengths,
            self._options(codes, negative),
            np.where(negative, -1, slots),
            sums,
            weights,
            found,
            span_lengths=spans,
            block_lengths=blocks,
            measures_ratios=ratios is None,
        )
        if ratios is not None:
            found.counts[:, kernels.COUNTS_OF_RATIOS] = ratios.counts[:, kernels.COUNTS_OF_RATIOS]
            found.sums[:, kernels.OF_SAMPLES_RATIOS] = ratios.sums[:, kernels.OF_SAMPLES_RATIOS]
        if not np.isfinite(found.sums[:, : kernels.LOG_RATIO_SUM]).all():
            raise MismatchError(f"{self._name}: log-probs are not all finite: run `pear-data verify`")
        positive = ~negative
        if not len(sums.weights):
            log_ratio = log_ratios(flat_target, flat_behavior, spans)
            self.totals.add_tokens(codes, positive, lengths, sums, log_ratio, weights)
        part = SampleSums(found.counts[positive], found.sums[positive])
        self.totals.add_samples(codes[positive], lengths[positive], part)

    def _options(self, codes: Counts, negative: npt.NDArray[np.bool_]) -> SampleOptions:
        """How samples are weighted; negatives get their sequence-level weight times -lambda (3.6)."""
        settings = self._weighting.settings
        is_baseline = settings.level in BASELINES
        levels = np.full(len(codes), LEVELS.index(settings.level), dtype=np.int8)
        if not is_baseline:
            levels[negative] = LEVELS.index("sequence")
        scale = np.full(len(codes), self._weighting.scale)
        scale[negative] *= -settings.negative_scale if settings.negative_scale else 0.0
        unbounded = np.tile((-np.inf, np.inf), (len(codes), 1))
        return SampleOptions(
            levels=levels,
            block_size=settings.block_size,
            log_gamma=self._log_gamma[codes],
            clip_log_ratio=self._ratio_bounds[codes],
            clip_log_weight=unbounded if is_baseline else self._weight_bounds[codes],
            center=np.full(len(codes), self._weighting.center),
            center_samples=settings.center == "sample",
            scale=scale,
            scale_samples=settings.normalize == "sample",
        )


def weight_rows(group: Group, weighed: Weighed) -> pa.Table:
    """Rows of a part (schema: `pear_data.schema.WEIGHTS`)."""
    lengths = np.zeros(len(weighed.scored), dtype=np.int64)
    lengths[weighed.scored] = weighed.lengths
    columns = [
        group.target["sample_id"],
        list_column(weighed.weights, lengths, FLOATS, weighed.scored),
        group.target["num_scored"],
        _STATUSES.take(pa.array(weighed.status)),
    ]
    return pa.table(columns, schema=WEIGHTS)


def summary_rows(group: Group, weighed: Weighed) -> pa.Table:
    """Rows of a summary (schema: `pear_data.schema.WEIGHT_SUMMARY`)."""
    columns: dict[str, Any] = {
        "sample_id": group.target["sample_id"],
        "num_scored": group.target["num_scored"],
        "status": _STATUSES.take(pa.array(weighed.status)),
    }
    for name, kind, index in _SAMPLE_COLUMNS:
        values = getattr(weighed.found, kind)[:, index]
        known = weighed.scored
        if group.behavior is None and name in _OF_LOG_RATIOS:
            known = np.zeros_like(known)
        columns[name] = _scatter(values, weighed.scored, known, WEIGHT_SUMMARY.field(name).type)
    return pa.table([columns[name] for name in WEIGHT_SUMMARY.names], schema=WEIGHT_SUMMARY)


def _scatter(
    values: npt.NDArray[Any], rows: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_], kind: pa.DataType
) -> pa.Array:
    """A column with `values` at the true `rows`, null where not `known`."""
    column = np.zeros(len(rows), dtype=values.dtype)
    column[rows] = values
    return pa.array(column, mask=~known).cast(kind)


def _of_rows(table: pa.Table, rows: npt.NDArray[np.bool_]) -> pa.Table:
    return table if rows.all() else table.filter(pa.array(rows))


def is_ok(scores: pa.Table) -> npt.NDArray[np.bool_]:
    """The rows that a policy could score."""
    return np.asarray(pc.equal(scores["status"], STATUS_OK).to_numpy(), dtype=np.bool_)
