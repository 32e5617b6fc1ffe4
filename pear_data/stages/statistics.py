"""The diagnostics of a weighting: how concentrated its weights are and how far apart its two policies lie.

Definitions (N scored tokens of n samples; w their weights, d their unclipped log-ratios, target minus behavior):

    ess         (sum w)^2 / sum w^2                      ess_ratio      ess / N
    seq_ess     the same over each sample's mean weight  seq_ess_ratio  seq_ess / n
    kl          mean(-d), also called k1                 k3_kl          mean(exp(d) - 1 - d)
    chi2_token  mean(exp(2 d)) - 1                       chi2_seq       mean over samples of exp(2 sum d) - 1
    ppl_*       exp(-mean log-prob)                      ppl_ratio      ppl_target / ppl_behavior = exp(kl)

The corpus was sampled from the behavior policy, so kl and k3_kl estimate KL(behavior || target).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pear_data.config import WeightSettings
from pear_data.errors import UsageError
from pear_data.stages.findings import Finding, findings
from pear_data.stages.histogram import Histogram
from pear_data.stages.measure import EXP_BOUND, Measured, Totals, measure
from pear_data.stages.noise import Audit, stored_audit
from pear_data.store import Store

QUANTILES = {"p1": 0.01, "p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
TOP_SHARE = 0.01
_NEAR = "within 0.2 % of its value"


class GroupStatistics(BaseModel):
    """Diagnostics of the whole corpus or of one source. Shares lie between 0 and 1; logarithms are natural.

    Numbers are over the scored tokens of samples with label 1 and status ok, and null where there are none.
    """

    model_config = ConfigDict(extra="forbid")

    source: str | None = Field(description="Source, or null for the whole corpus.")
    samples: int = Field(description="Samples the numbers are over.")
    scored_tokens: int = Field(description="Scored tokens the numbers are over.")
    statuses: dict[str, int] = Field(description="All samples by the status of their weights.")
    negatives: int = Field(description="Samples with label -1; their weights are not in the numbers.")

    ess: float | None = Field(description="Effective number of tokens, (sum w)^2 / sum w^2.")
    ess_ratio: float | None = Field(description="ess / scored_tokens; 1 where all weights are equal.")
    seq_ess: float | None = Field(description="Effective number of samples, over their mean weights.")
    seq_ess_ratio: float | None = Field(description="seq_ess / samples.")

    weight_mean: float | None
    weight_std: float | None = Field(description="Standard deviation of the weights.")
    weight_min: float | None
    weight_p1: float | None = Field(description=f"Quantile, {_NEAR}.")
    weight_p5: float | None = Field(description=f"Quantile, {_NEAR}.")
    weight_p50: float | None = Field(description=f"Quantile, {_NEAR}.")
    weight_p95: float | None = Field(description=f"Quantile, {_NEAR}.")
    weight_p99: float | None = Field(description=f"Quantile, {_NEAR}.")
    weight_max: float | None
    top_1pct_mass: float | None = Field(description="Part of all weight that the top 1 % of tokens hold.")
    log_weight_clipped_low: float | None = Field(description="Share of tokens at the lower log-weight clip.")
    log_weight_clipped_high: float | None = Field(description="Share of tokens at the upper log-weight clip.")
    saturated: float | None = Field(description="Share of tokens whose suffix sum is at either clip.")
    weight_by_decile: list[float | None] = Field(
        description="Mean weight in each tenth of the samples, first to last; null where no token falls."
    )

    log_ratio_mean: float | None = Field(description="Mean of d, unclipped.")
    log_ratio_min: float | None
    log_ratio_p1: float | None = Field(description=f"Quantile, {_NEAR}.")
    log_ratio_p5: float | None = Field(description=f"Quantile, {_NEAR}.")
    log_ratio_p50: float | None = Field(description=f"Quantile, {_NEAR}.")
    log_ratio_p95: float | None = Field(description=f"Quantile, {_NEAR}.")
    log_ratio_p99: float | None = Field(description=f"Quantile, {_NEAR}.")
    log_ratio_max: float | None
    log_ratio_clipped_low: float | None = Field(description="Share of tokens with d below the lower clip.")
    log_ratio_clipped_high: float | None = Field(description="Share of tokens with d above the upper clip.")

    kl: float | None = Field(description="k1, mean(-d): estimates KL(behavior || target) per token.")
    k3_kl: float | None = Field(description="mean(exp(d) - 1 - d): the same, never negative.")
    chi2_token: float | None = Field(description="mean(exp(2 d)) - 1.")
    chi2_seq: float | None = Field(description="Mean over samples of exp(2 sum d) - 1.")
    ppl_target: float | None = Field(description="Perplexity under the target policy.")
    ppl_behavior: float | None = Field(description="Perplexity under the behavior policy.")
    ppl_ratio: float | None = Field(description="ppl_target / ppl_behavior.")
    log_ppl_diff: float | None = Field(description="log ppl_target - log ppl_behavior.")


class WeightingStatistics(BaseModel):
    """Diagnostics of one weighting."""

    model_config = ConfigDict(extra="forbid")

    weights: str = Field(description="Name of the weighting.")
    settings: WeightSettings
    corpus: GroupStatistics
    sources: list[GroupStatistics] = Field(description="The same numbers for each source, by name.")
    audits: dict[str, Audit | None] = Field(
        description="Measured noise of the two policies' log-probs, by policy; null where none was measured."
    )
    findings: list[Finding] = Field(description="What looks wrong, in words, with a remedy.")


def statistics(store: Store, names: Sequence[str] | None = None) -> list[WeightingStatistics]:
    """Diagnostics of the named weightings, or of all of them.

    Each takes one pass over its weights and log-probs; memory does not grow with the corpus.

    Raises:
        UsageError: there is no such weighting, or none at all, or it is not finished.
        MismatchError: an artefact differs from its manifest.
    """
    chosen = list(names or store.manifest.names("weights"))
    if not chosen:
        raise UsageError(f"{store.path} has no weights yet: make some with `pear-data weight`")
    return [summarise(store, measure(store, name)) for name in chosen]


def summarise(store: Store, measured: Measured) -> WeightingStatistics:
    """The diagnostics of a pass over a weighting."""
    corpus = _group(None, measured.whole())
    sources = [_group(source, totals) for source, totals in sorted(measured.sources.items())]
    policies = (measured.settings.target, measured.settings.behavior)
    stages = {policy: store.stage(f"scores/{policy}") for policy in policies}
    dtypes = {policy: str(stage.settings.get("dtype", "")) for policy, stage in stages.items()}
    audits = {policy: stored_audit(stage) for policy, stage in stages.items()}
    return WeightingStatistics(
        weights=measured.name,
        settings=measured.settings,
        corpus=corpus,
        sources=sources,
        audits=audits,
        findings=findings(corpus, sources, measured.settings, dtypes, audits),
    )


def _group(source: str | None, totals: Totals) -> GroupStatistics:
    counted = {
        "source": source,
        "samples": totals.samples,
        "scored_tokens": totals.tokens,
        "statuses": dict(sorted(Counter(totals.statuses).items())),
        "negatives": totals.negatives,
    }
    if not totals.tokens:
        empty = dict.fromkeys(set(GroupStatistics.model_fields) - set(counted) - {"weight_by_decile"})
        return GroupStatistics.model_validate({**counted, **empty, "weight_by_decile": []})
    return GroupStatistics.model_validate({**counted, **_weight_numbers(totals), **_ratio_numbers(totals)})


def _weight_numbers(totals: Totals) -> dict[str, float | list[float | None]]:
    n, weights = totals.tokens, totals.weights
    mean = totals.weight / n
    ess = totals.weight**2 / totals.weight_square
    seq_ess = totals.sample_weight**2 / totals.sample_weight_square
    deciles = zip(totals.decile_weight.tolist(), totals.decile_tokens.tolist(), strict=True)
    return {
        "ess": ess,
        "ess_ratio": ess / n,
        "seq_ess": seq_ess,
        "seq_ess_ratio": seq_ess / totals.samples,
        "weight_mean": mean,
        "weight_std": max(totals.weight_square / n - mean**2, 0.0) ** 0.5,
        **_quantiles("weight", weights),
        "top_1pct_mass": weights.top_share(TOP_SHARE),
        "log_weight_clipped_low": totals.weight_low / n,
        "log_weight_clipped_high": totals.weight_high / n,
        "saturated": (totals.weight_low + totals.weight_high) / n,
        "weight_by_decile": [weight / count if count else None for weight, count in deciles],
    }


def _ratio_numbers(totals: Totals) -> dict[str, float]:
    n = totals.tokens
    target, behavior = totals.target_logprob / n, totals.behavior_logprob / n
    return {
        "log_ratio_mean": target - behavior,
        **_quantiles("log_ratio", totals.log_ratios),
        "log_ratio_clipped_low": totals.ratio_low / n,
        "log_ratio_clipped_high": totals.ratio_high / n,
        "kl": behavior - target,
        "k3_kl": totals.k3 / n,
        "chi2_token": totals.ratio_square / n - 1,
        "chi2_seq": totals.sample_ratio_square / totals.samples - 1,
        "ppl_target": float(np.exp(min(-target, EXP_BOUND))),
        "ppl_behavior": float(np.exp(min(-behavior, EXP_BOUND))),
        "ppl_ratio": float(np.exp(np.clip(behavior - target, -EXP_BOUND, EXP_BOUND))),
        "log_ppl_diff": behavior - target,
    }


def _quantiles(prefix: str, histogram: Histogram) -> dict[str, float]:
    values = histogram.quantiles(list(QUANTILES.values())).tolist()
    return {
        f"{prefix}_min": histogram.minimum,
        f"{prefix}_max": histogram.maximum,
        **{f"{prefix}_{name}": value for name, value in zip(QUANTILES, values, strict=True)},
    }
