"""A row group on its way out: samples as flat arrays, every weight at the index of the label it multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.store.columns import flat_values, list_lengths, offsets_of

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rows:
    """Samples laid end to end; the arrays with one entry a token have sum(lengths) entries."""

    sample_id: pa.Array
    source: pa.Array
    record: pa.Array | None
    lengths: npt.NDArray[np.int64]
    input_ids: npt.NDArray[np.int32]
    scored: npt.NDArray[np.bool_]
    loss_weights: Floats
    behavior_logprobs: Floats | None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        return offsets_of(self.lengths)

    @property
    def num_scored(self) -> npt.NDArray[np.int64]:
        """Scored tokens of each sample."""
        return np.diff(np.concatenate(([0], np.cumsum(self.scored)))[self.offsets])

    def name_at(self, token: int) -> str:
        """The sample that token number `token` belongs to, as errors name it."""
        sample = int(np.searchsorted(self.offsets, token, side="right")) - 1
        return f"sample {self.sample_id[sample].as_py()!r}"

    def take(self, keep: npt.NDArray[np.bool_]) -> Rows:
        """The samples where `keep` [samples] is true."""
        if keep.all():
            return self
        return self._tokens(np.repeat(keep, self.lengths), self.lengths[keep], pa.array(keep))

    def part(self, start: int, stop: int) -> Rows:
        """The samples `start` to `stop`, without a copy."""
        tokens = slice(int(self.offsets[start]), int(self.offsets[stop]))
        behavior = self.behavior_logprobs
        return Rows(
            sample_id=self.sample_id[start:stop],
            source=self.source[start:stop],
            record=None if self.record is None else self.record[start:stop],
            lengths=self.lengths[start:stop],
            input_ids=self.input_ids[tokens],
            scored=self.scored[tokens],
            loss_weights=self.loss_weights[tokens],
            behavior_logprobs=None if behavior is None else behavior[tokens],
        )

    def cut(self, max_length: int) -> Rows:
        """Every sample's first `max_length` tokens."""
        position = np.arange(len(self.input_ids)) - np.repeat(self.offsets[:-1], self.lengths)
        return self._tokens(position < max_length, np.minimum(self.lengths, max_length), None)

    def without_first(self, tokens: int) -> Rows:
        """Every sample without its first `tokens` tokens."""
        position = np.arange(len(self.input_ids)) - np.repeat(self.offsets[:-1], self.lengths)
        return self._tokens(position >= tokens, np.maximum(self.lengths - tokens, 0), None)

    def without_unscored_tail(self) -> Rows:
        """Every sample up to its last scored token: what follows it changes no loss of a causal model."""
        index = np.where(self.scored, np.arange(len(self.scored)), -1)
        last = np.maximum.reduceat(index, self.offsets[:-1]) if len(self) else index
        lengths = last - self.offsets[:-1] + 1
        position = np.arange(len(self.input_ids)) - np.repeat(self.offsets[:-1], self.lengths)
        return self._tokens(position < np.repeat(lengths, self.lengths), lengths, None)

    def _tokens(
        self, tokens: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64], samples: pa.Array | None
    ) -> Rows:
        def of(column: pa.Array | None) -> pa.Array | None:
            return column if samples is None or column is None else column.filter(samples)

        behavior = self.behavior_logprobs
        return replace(
            self,
            sample_id=of(self.sample_id),
            source=of(self.source),
            record=of(self.record),
            lengths=lengths,
            input_ids=self.input_ids[tokens],
            scored=self.scored[tokens],
            loss_weights=self.loss_weights[tokens],
            behavior_logprobs=None if behavior is None else behavior[tokens],
        )


def rows_of(corpus: pa.Table, weights: pa.Table, scores: pa.Table | None) -> Rows:
    """Samples of a row group, all with weights; `scores` are the behavior policy's, where they are wanted."""
    scored = np.asarray(flat_values(corpus["loss_mask"]), dtype=np.bool_)
    return Rows(
        sample_id=_whole(corpus["sample_id"]),
        source=_whole(corpus["source"]),
        record=_whole(corpus["record"]) if "record" in corpus.column_names else None,
        lengths=list_lengths(corpus["input_ids"]),
        input_ids=flat_values(corpus["input_ids"]),
        scored=scored,
        loss_weights=_at_labels(weights["weights"], scored),
        behavior_logprobs=None if scores is None else _at_labels(scores["logprobs"], scored),
    )


def joined(parts: Sequence[Rows]) -> Rows:
    """The samples of all parts, at least one, in their order."""
    if len(parts) == 1:
        return parts[0]
    records = [part.record for part in parts if part.record is not None]
    behavior = [part.behavior_logprobs for part in parts if part.behavior_logprobs is not None]
    return Rows(
        sample_id=pa.concat_arrays([part.sample_id for part in parts]),
        source=pa.concat_arrays([part.source for part in parts]),
        record=pa.concat_arrays(records) if records else None,
        lengths=np.concatenate([part.lengths for part in parts]),
        input_ids=np.concatenate([part.input_ids for part in parts]),
        scored=np.concatenate([part.scored for part in parts]),
        loss_weights=np.concatenate([part.loss_weights for part in parts]),
        behavior_logprobs=np.concatenate(behavior) if behavior else None,
    )


def _at_labels(of_scored: pa.ChunkedArray, scored: npt.NDArray[np.bool_]) -> Floats:
    values = np.zeros(len(scored), dtype=np.float32)
    values[scored] = flat_values(of_scored)
    return values


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
