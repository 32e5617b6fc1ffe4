"""One pass over a weighting and the log-probs it was made from: running sums and histograms for each source."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.config import WeightSettings
from pear_data.schema import STATUS_OK
from pear_data.stages.alignment import aligned_row_groups, aligned_shards
from pear_data.stages.histogram import Histogram
from pear_data.stages.spans import compared_spans
from pear_data.store import Store
from pear_data.store.columns import flat_values
from pear_data.store.manifest import CORPUS
from pear_data.weighting import log_ratios

DECILES = 10
# Log-ratios are bounded at this inside exp, so that a wild one shows as a huge number and not as infinity.
EXP_BOUND = 300.0

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(slots=True)
class Totals:
    """Sums over the tokens (N), samples (n) and tenths of samples of one source; d is the unclipped log-ratio."""

    statuses: Counter[str] = field(default_factory=Counter)
    negatives: int = 0
    samples: int = 0
    tokens: int = 0
    weight: float = 0.0  # sum w
    weight_square: float = 0.0  # sum w^2
    sample_weight: float = 0.0  # sum over samples of their mean weight
    sample_weight_square: float = 0.0
    target_logprob: float = 0.0
    behavior_logprob: float = 0.0
    k3: float = 0.0  # sum exp(d) - 1 - d
    ratio_square: float = 0.0  # sum exp(2 d)
    sample_ratio_square: float = 0.0  # sum over samples of exp(2 sum d)
    ratio_low: int = 0  # tokens with d below the lower clip
    ratio_high: int = 0
    weight_low: int = 0  # tokens whose weight is the lower bound
    weight_high: int = 0
    decile_weight: Floats = field(default_factory=lambda: np.zeros(DECILES))
    decile_tokens: Counts = field(default_factory=lambda: np.zeros(DECILES, dtype=np.int64))
    weights: Histogram = field(default_factory=Histogram)
    log_ratios: Histogram = field(default_factory=Histogram)

    def update(self, other: Totals) -> None:
        """Add another source's totals."""
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if isinstance(mine, (Histogram, Counter)):
                mine.update(theirs)
            else:
                setattr(self, entry.name, mine + theirs)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one pass found for a weighting: totals by source, in the order of first appearance."""

    name: str
    settings: WeightSettings
    sources: dict[str, Totals]

    def whole(self) -> Totals:
        """Totals of the whole corpus."""
        totals = Totals()
        for part in self.sources.values():
            totals.update(part)
        return totals


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Weighted tokens of n samples, back to back [N]."""

    target: npt.NDArray[np.float32]
    behavior: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    lengths: Counts  # [n], each at least 1
    spans: Counts | None  # tokens of each span, summing to N; None where both policies share the ids


def measure(store: Store, name: str) -> Measured:
    """Read a weighting and its two policies once. Memory is bounded by a row group and the histograms.

    Only samples with label 1 and status ok are summed; negatives and other statuses are counted.

    Raises:
        UsageError: the weighting or one of its policies is missing or not finished.
        MismatchError: an artefact differs from its manifest, or the weighting is not of the present log-probs.
    """
    key = f"weights/{name}"
    settings = weighting_settings(store, name)
    target, behavior = f"scores/{settings.target}", f"scores/{settings.behavior}"
    columns = {
        CORPUS: ["source", "label"],
        target: ["logprobs", "span_tokens"],
        behavior: ["logprobs", "span_tokens"],
        key: ["weights", "num_scored", "status"],
    }
    sources: dict[str, Totals] = {}
    for shard in aligned_shards(store, [target, behavior, key]):
        for tables in aligned_row_groups(store, shard, columns):
            named = tables[CORPUS]["source"].combine_chunks().dictionary_encode()
            for code, source in enumerate(named.dictionary.to_pylist()):
                rows = np.flatnonzero(named.indices.to_numpy() == code)
                totals = sources.setdefault(source, Totals())
                kept = _count_rows(tables[CORPUS], tables[key], rows, totals)
                if len(kept):
                    _add(totals, _tokens(tables[target], tables[behavior], tables[key], kept), settings)
    return Measured(name, settings, sources)


def weighting_settings(store: Store, name: str) -> WeightSettings:
    """The settings a weighting was made with. Raises UsageError if there is no such weighting."""
    stored = store.stage(f"weights/{name}").settings
    chosen = {key: value for key, value in stored.items() if key in WeightSettings.model_fields}
    return WeightSettings(**chosen, name=name)


def bound_weights(settings: WeightSettings) -> tuple[np.float32, np.float32]:
    """The weights at the two log-weight clips, as stored."""
    with np.errstate(over="ignore"):
        low, high = np.exp(np.array(settings.clip_log_weight)).astype(np.float32)
    return low, high


def _count_rows(corpus: pa.Table, weights: pa.Table, rows: Counts, totals: Totals) -> Counts:
    """Count the statuses of `rows`; return those whose tokens are summed."""
    status = weights["status"].to_numpy()[rows]
    totals.statuses.update(status.tolist())
    ok = status == STATUS_OK
    negative = corpus["label"].to_numpy()[rows] < 0
    totals.negatives += int(negative.sum())
    kept: Counts = rows[ok & ~negative]
    return kept


def _tokens(target: pa.Table, behavior: pa.Table, weights: pa.Table, rows: Counts) -> _Tokens:
    taken = pa.array(rows)
    target, behavior = target.take(taken), behavior.take(taken)
    return _Tokens(
        flat_values(target["logprobs"]),
        flat_values(behavior["logprobs"]),
        flat_values(weights["weights"].take(taken)),
        weights["num_scored"].to_numpy()[rows].astype(np.int64),
        compared_spans(target, behavior),
    )


def _add(totals: Totals, tokens: _Tokens, settings: WeightSettings) -> None:
    weight = tokens.weights.astype(np.float64)
    log_ratio = log_ratios(tokens.target, tokens.behavior, tokens.spans)
    starts = np.cumsum(tokens.lengths) - tokens.lengths
    sample_weight = np.add.reduceat(weight, starts) / tokens.lengths
    bounded = np.clip(log_ratio, -EXP_BOUND, EXP_BOUND)
    sample_ratio = np.clip(np.add.reduceat(log_ratio, starts), -EXP_BOUND, EXP_BOUND)
    (ratio_low, ratio_high), (weight_low, weight_high) = settings.clip_log_ratio, bound_weights(settings)
    decile = (np.arange(len(weight)) - np.repeat(starts, tokens.lengths)) * DECILES
    decile //= np.repeat(tokens.lengths, tokens.lengths)

    totals.samples += len(tokens.lengths)
    totals.tokens += len(weight)
    totals.weight += float(weight.sum())
    totals.weight_square += float((weight**2).sum())
    totals.sample_weight += float(sample_weight.sum())
    totals.sample_weight_square += float((sample_weight**2).sum())
    totals.target_logprob += float(tokens.target.sum(dtype=np.float64))
    totals.behavior_logprob += float(tokens.behavior.sum(dtype=np.float64))
    totals.k3 += float((np.expm1(bounded) - bounded).sum())
    totals.ratio_square += float(np.exp(2 * bounded).sum())
    totals.sample_ratio_square += float(np.exp(2 * sample_ratio).sum())
    totals.ratio_low += int((log_ratio < ratio_low).sum())
    totals.ratio_high += int((log_ratio > ratio_high).sum())
    totals.weight_low += int((tokens.weights <= weight_low).sum())
    totals.weight_high += int((tokens.weights >= weight_high).sum())
    totals.decile_weight += np.bincount(decile, weights=weight, minlength=DECILES)
    totals.decile_tokens += np.bincount(decile, minlength=DECILES)
    totals.weights.add(tokens.weights)
    totals.log_ratios.add(log_ratio.astype(np.float32))
