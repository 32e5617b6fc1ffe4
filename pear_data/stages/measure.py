"""What a weighting's totals files say, merged over its shards: sums and histograms for each source, no token read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pear_data.config import WeightSettings
from pear_data.errors import MismatchError
from pear_data.schema import DECILES, STATUS_DROPPED, STATUS_OK, STATUS_UNSCORED, WEIGHT_TOTALS
from pear_data.stages.alignment import aligned_shards
from pear_data.stages.histogram import Histogram
from pear_data.store import Store
from pear_data.store.columns import flat_values, list_lengths, offsets_of

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def _counts() -> Counts:
    return np.zeros(DECILES, dtype=np.int64)


def _sums() -> Floats:
    return np.zeros(DECILES)


@dataclass(slots=True)
class Totals:
    """Sums over the samples with label 1 and status ok of one source, and by tenth of their scored tokens [DECILES].

    w are weights and d log-ratios, unclipped and uncentered. What needs the behavior policy is NaN or empty where the
    store has none.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    negatives: int = 0
    samples: int = 0
    sample_weight: float = 0.0  # sum over samples of their mean weight
    sample_weight_square: float = 0.0
    sample_ratio_square: float = 0.0  # sum over samples of exp(2 sum d)
    decile_tokens: Counts = field(default_factory=_counts)
    decile_weight: Floats = field(default_factory=_sums)  # sum w
    decile_weight_square: Floats = field(default_factory=_sums)  # sum w^2
    decile_target: Floats = field(default_factory=_sums)  # sum of the target's log-probs
    decile_behavior: Floats = field(default_factory=_sums)
    decile_ratio_square: Floats = field(default_factory=_sums)  # sum d^2
    decile_ratio_low: Counts = field(default_factory=_counts)  # tokens past the lower log-ratio clip
    decile_ratio_high: Counts = field(default_factory=_counts)
    decile_weight_low: Counts = field(default_factory=_counts)  # tokens at the lower log-weight clip
    decile_weight_high: Counts = field(default_factory=_counts)
    weights: Histogram = field(default_factory=Histogram)
    log_ratios: Histogram = field(default_factory=Histogram)
    sample_weights: Histogram = field(default_factory=Histogram)  # of samples' sum of weights

    def update(self, other: Totals) -> None:
        """Add another source's totals."""
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if isinstance(mine, (Histogram, Counter)):
                mine.update(theirs)
            else:
                setattr(self, entry.name, mine + theirs)

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return int(self.decile_tokens.sum())

    @property
    def weight(self) -> float:
        """Sum w."""
        return float(self.decile_weight.sum())

    @property
    def weight_square(self) -> float:
        """Sum w^2."""
        return float(self.decile_weight_square.sum())

    @property
    def target_logprob(self) -> float:
        """Sum of the target's log-probs."""
        return float(self.decile_target.sum())

    @property
    def behavior_logprob(self) -> float:
        """Sum of the behavior policy's log-probs; NaN where it is not known."""
        return float(self.decile_behavior.sum())

    @property
    def ratio_square(self) -> float:
        """Sum d^2."""
        return float(self.decile_ratio_square.sum())

    @property
    def ratio_low(self) -> int:
        """Tokens whose log-ratio, centered if so asked, is below the lower clip."""
        return int(self.decile_ratio_low.sum())

    @property
    def ratio_high(self) -> int:
        """Tokens whose log-ratio, centered if so asked, is above the upper clip."""
        return int(self.decile_ratio_high.sum())

    @property
    def weight_low(self) -> int:
        """Tokens whose weight is at the lower bound."""
        return int(self.decile_weight_low.sum())

    @property
    def weight_high(self) -> int:
        """Tokens whose weight is at the upper bound."""
        return int(self.decile_weight_high.sum())


@dataclass(frozen=True, slots=True)
class Measured:
    """A weighting's totals by source, in the order of first appearance."""

    name: str
    settings: WeightSettings
    sources: dict[str, Totals]

    def whole(self) -> Totals:
        """Totals of the whole corpus."""
        totals = Totals()
        for part in self.sources.values():
            totals.update(part)
        return totals


def measure(store: Store, name: str) -> Measured:
    """Merge the totals files of a weighting. Memory is bounded by its sources and the bins they use.

    Raises:
        UsageError: the weighting is missing or not finished.
        MismatchError: a totals file differs from its manifest or is missing, or the weighting is not of the present
            log-probs.
    """
    key = f"weights/{name}"
    settings = weighting_settings(store, name)
    sources: dict[str, Totals] = {}
    for shard in aligned_shards(store, [key]):
        entry = shard.entries[key].totals
        if entry is None:
            raise MismatchError(
                f"{key} in {store.path} was made by an earlier pear-data, without the totals that diagnostics read: "
                f"run `pear-data migrate --store {store.path}`"
            )
        for source, totals in _by_source(store.file(entry)):
            sources.setdefault(source, Totals()).update(totals)
    return Measured(name, settings, sources)


def weighting_settings(store: Store, name: str) -> WeightSettings:
    """The settings a weighting was made with. Raises UsageError if there is no such weighting."""
    stored = store.stage(f"weights/{name}").settings
    chosen = {key: value for key, value in stored.items() if key in WeightSettings.model_fields}
    return WeightSettings(**chosen, name=name)


def _by_source(path: Path) -> Iterator[tuple[str, Totals]]:
    """Each source of a totals file."""
    with pq.ParquetFile(path) as parquet:
        table = parquet.read()
    if not table.schema.equals(WEIGHT_TOTALS):
        raise MismatchError(f"{path} has other columns than totals have: run `pear-data verify`")
    numbers = {name: _per_row(table[name]) for name in table.column_names if name != "source"}
    for row, source in enumerate(table["source"].to_pylist()):
        yield source, _totals({name: values[row] for name, values in numbers.items()})


def _per_row(column: pa.ChunkedArray) -> Any:
    """The value of each row: numbers [n], or a list of n arrays."""
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    values, offsets = flat_values(column), offsets_of(list_lengths(column))
    return [values[start:end] for start, end in itertools.pairwise(offsets)]


def _totals(row: dict[str, Any]) -> Totals:
    statuses = {status: row[status] for status in (STATUS_OK, STATUS_UNSCORED, STATUS_DROPPED)}
    totals = Totals(
        statuses=Counter({status: count for status, count in statuses.items() if count}),
        negatives=row["negatives"],
        samples=row["samples"],
        sample_weight=row["sample_mean_sum"],
        sample_weight_square=row["sample_mean_square_sum"],
        sample_ratio_square=row["sample_ratio_square_sum"],
        decile_tokens=row["tokens"],
        decile_weight=row["weight_sum"],
        decile_weight_square=row["weight_square_sum"],
        decile_target=row["target_logprob_sum"],
        decile_behavior=row["behavior_logprob_sum"],
        decile_ratio_square=row["log_ratio_square_sum"],
        decile_ratio_low=row["clipped_low"],
        decile_ratio_high=row["clipped_high"],
        decile_weight_low=row["saturated_low"],
        decile_weight_high=row["saturated_high"],
    )
    totals.weights.merge(row["weight_bins"], row["weight_counts"], row["weight_min"], row["weight_max"])
    totals.log_ratios.merge(
        row["log_ratio_bins"], row["log_ratio_counts"], row["log_ratio_min"], row["log_ratio_max"]
    )
    totals.sample_weights.merge(row["sample_weight_bins"], row["sample_weight_counts"])
    return totals
