"""Weightings side by side: their diagnostics, how far they rank tokens and samples alike, and where they disagree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pear_data.errors import UsageError
from pear_data.stages.alignment import aligned_shards
from pear_data.stages.compared_samples import ComparedSamples, compared_samples, pairs
from pear_data.stages.compared_tokens import ComparedTokens, compare_tokens, logs_of
from pear_data.stages.disagreements import (
    SampleDisagreement,
    TokenDisagreement,
    sample_disagreements,
    token_disagreements,
)
from pear_data.stages.rank_correlation import Correlation, ranks_of
from pear_data.stages.statistics import WeightingStatistics, statistics
from pear_data.store import Store


class PairComparison(BaseModel):
    """Two weightings. A weight of 0 counts as the least float32, 1.2e-38, where logarithms are taken."""

    model_config = ConfigDict(extra="forbid")

    first: str
    second: str
    token_rank_correlation: float | None = Field(
        description="Spearman's, over scored tokens; weights less than 0.8 % apart may count as equal; "
        "null where all weights of a weighting do."
    )
    sample_rank_correlation: float | None = Field(
        description="Spearman's, over the samples' mean weights; null where they are all equal."
    )
    token_log_difference: float | None = Field(
        description="Mean over scored tokens of log(first's weight) - log(second's weight)."
    )
    sample_log_difference: float | None = Field(
        description="Mean over samples of log(first's mean weight) - log(second's mean weight)."
    )
    samples: list[SampleDisagreement] = Field(
        description="The samples they disagree on most, farthest first."
    )
    tokens: list[TokenDisagreement] = Field(
        description="The tokens they disagree on most, farthest first, one of a sample."
    )


class Comparison(BaseModel):
    """Several weightings of one corpus side by side."""

    model_config = ConfigDict(extra="forbid")

    weightings: list[WeightingStatistics] = Field(
        description="Diagnostics of each weighting over its own samples, in the order asked for."
    )
    samples: int = Field(description="Samples with label 1 and status ok in all of them: those compared.")
    scored_tokens: int = Field(description="Scored tokens of those samples.")
    pairs: list[PairComparison] = Field(description="Every two weightings.")


def compare(store: Store, names: Sequence[str], *, disagreements: int = 5) -> Comparison:
    """Compare two or more weightings on the samples that have weights in all of them.

    Memory is bounded by a shard's summaries, a row group of each weighting, and some 50 bytes for each sample of each.

    Args:
        store: an open store.
        names: weightings, at least two.
        disagreements: how many samples and how many tokens to name for each pair, at least 1.

    Raises:
        UsageError: fewer than two names, one of them twice, no such weighting, or one that is not finished.
        MismatchError: an artefact differs from its manifest, or a weighting is not of the present log-probs.
    """
    _check_names(store, names)
    shards = aligned_shards(store, [f"weights/{name}" for name in names])
    weightings = statistics(store, names)
    samples = compared_samples(store, names, shards)
    tokens = compare_tokens(store, names, samples, disagreements)
    correlation = Correlation(len(names))
    correlation.add([ranks_of(means) for means in samples.weight_means])
    return Comparison(
        weightings=weightings,
        samples=len(samples.num_scored),
        scored_tokens=int(samples.num_scored.sum()),
        pairs=[
            _pair(store, names, pair, samples, tokens, correlation, disagreements)
            for pair in pairs(len(names))
        ],
    )


def _check_names(store: Store, names: Sequence[str]) -> None:
    have = ", ".join(store.manifest.names("weights")) or "none yet, `pear-data weight` makes them"
    if len(names) < 2:
        raise UsageError(f"compare takes two weightings or more (have: {have})")
    for name in names:
        store.complete_stage(f"weights/{name}")
        if names.count(name) > 1:
            raise UsageError(f"{name} is named twice: compare it with another weighting (have: {have})")


def _pair(
    store: Store,
    names: Sequence[str],
    pair: tuple[int, int],
    samples: ComparedSamples,
    tokens: ComparedTokens,
    correlation: Correlation,
    wanted: int,
) -> PairComparison:
    one, other = pair
    found = PairComparison(
        first=names[one],
        second=names[other],
        token_rank_correlation=tokens.correlation.of(one, other),
        sample_rank_correlation=correlation.of(one, other),
        token_log_difference=None,
        sample_log_difference=None,
        samples=[],
        tokens=[],
    )
    if len(samples.num_scored):
        first, second = (logs_of(samples.weight_means[index]).astype(np.float64) for index in pair)
        of_samples = float((first - second).mean())
        of_tokens = float(tokens.log_sums[one] - tokens.log_sums[other]) / int(samples.num_scored.sum())
        found.sample_log_difference, found.token_log_difference = of_samples, of_tokens
        found.samples = sample_disagreements(store, samples, pair, first - second - of_samples, wanted)
        found.tokens = token_disagreements(store, samples, tokens.farthest(pair, of_tokens), of_tokens)
    return found
