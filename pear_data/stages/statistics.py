"""The diagnostics of a weighting: how concentrated its weights are and how far apart its two policies lie.

Definitions (N scored tokens of n samples; w their weights, d their unclipped log-ratios, target minus behavior):

    ess         (sum w)^2 / sum w^2                      ess_ratio      ess / N
    seq_ess     the same over each sample's mean weight  seq_ess_ratio  seq_ess / n
    kl          mean(-d), also called k1                 k3_kl          mean(exp(d) - 1 - d)
    chi2_token  mean(exp(2 d)) - 1                       chi2_seq       mean over samples of exp(2 sum d) - 1
    ppl_*       exp(-mean log-prob)                      ppl_ratio      ppl_target / ppl_behavior = exp(kl)

The corpus was sampled from the behavior policy, so kl and k3_kl estimate KL(behavior || target). Nothing here reads a
token: sums were taken when the weights were made, and quantiles come from histograms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from pear_data.config import BASELINES, WeightSettings
from pear_data.errors import UsageError
from pear_data.schema import DECILES
from pear_data.stages.divergence import bounded_exp, chi2_mean, k3_mean
from pear_data.stages.faults import TOP_SHARE, Group
from pear_data.stages.findings import Finding, findings
from pear_data.stages.histogram import Histogram
from pear_data.stages.measure import Measured, Totals, measure
from pear_data.stages.noise import Audit, stored_audit
from pear_data.stages.token_drift import drift_findings
from pear_data.store import Store

QUANTILES = {"p1": 0.01, "p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
_NEAR = "within 0.4 % of its value"
_FROM_HISTOGRAM = "from the histogram of d, as a rule within 0.1 % of its value"


class DecileStatistics(BaseModel):
    """Diagnostics of one tenth of the samples by position: the first tenth of every sample's scored tokens, and so on.

    Numbers are null where no token falls into it, where they need a behavior policy that is not there, and, of clips,
    for a baseline.
    """

    model_config = ConfigDict(extra="forbid")

    tokens: int = Field(description="Scored tokens in this tenth.")
    ess_ratio: float | None = Field(description="(sum w)^2 / sum w^2 / tokens.")
    weight_mean: float | None
    log_ratio_mean: float | None = Field(description="Mean of d, unclipped.")
    log_ratio_clipped_low: float | None = Field(description="Share of tokens past the lower log-ratio clip.")
    log_ratio_clipped_high: float | None = Field(description="Share of tokens past the upper log-ratio clip.")
    saturated: float | None = Field(description="Share of tokens whose suffix sum is at either clip.")
    ppl_ratio: float | None = Field(description="exp(mean(-d)).")


class GroupStatistics(BaseModel):
    """Diagnostics of the whole corpus or of one source. Shares lie between 0 and 1; logarithms are natural.

    Numbers are over the scored tokens of samples with label 1 and status ok, and null where there are none. Those of
    log-ratios are null too for a baseline without a behavior policy, those of clips for any baseline.
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
    top_1pct_mass: float | None = Field(
        description="Part of all weight that the 1 % of tokens with the greatest weights hold, within 0.8 %."
    )
    top_1pct_samples_mass: float | None = Field(
        description="Part of all weight that the 1 % of samples with the greatest sums of weights hold, within 0.8 %."
    )
    log_weight_clipped_low: float | None = Field(
        description="Share of tokens at the lower log-weight clip, before weights are scaled."
    )
    log_weight_clipped_high: float | None = Field(
        description="Share of tokens at the upper log-weight clip, before weights are scaled."
    )
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
    log_ratio_clipped_low: float | None = Field(
        description="Share of tokens whose log-ratio, centered if so asked, is below the lower clip."
    )
    log_ratio_clipped_high: float | None = Field(
        description="Share of tokens whose log-ratio, centered if so asked, is above the upper clip."
    )

    kl: float | None = Field(description="k1, mean(-d): estimates KL(behavior || target) per token.")
    k3_kl: float | None = Field(
        description=f"mean(exp(d) - 1 - d): the same, never negative; {_FROM_HISTOGRAM}."
    )
    chi2_token: float | None = Field(
        description=f"mean(exp(2 d)) - 1; {_FROM_HISTOGRAM}, less so where single tokens decide it."
    )
    chi2_seq: float | None = Field(description="Mean over samples of exp(2 sum d) - 1.")
    ppl_target: float | None = Field(description="Perplexity under the target policy.")
    ppl_behavior: float | None = Field(description="Perplexity under the behavior policy.")
    ppl_ratio: float | None = Field(description="ppl_target / ppl_behavior.")
    log_ppl_diff: float | None = Field(description="log ppl_target - log ppl_behavior.")

    by_decile: list[DecileStatistics] = Field(
        description="Each tenth of the samples by position, first to last; empty where there are no tokens."
    )


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

    Raises:
        UsageError: there is no such weighting, or none at all, or it is not finished.
        MismatchError: an artefact differs from its manifest.
    """
    chosen = list(dict.fromkeys(names or store.manifest.begun("weights")))
    if not chosen:
        raise UsageError(f"{store.path} has no weights yet: make some with `pear-data weight`")
    return [summarise(store, measure(store, name)) for name in chosen]


def summarise(store: Store, measured: Measured) -> WeightingStatistics:
    """The diagnostics of a weighting's totals."""
    whole = measured.whole()
    clips = measured.settings.level not in BASELINES
    corpus = Group(_group(None, whole, clips), whole)
    sources = [
        Group(_group(source, totals, clips), totals) for source, totals in sorted(measured.sources.items())
    ]
    keys = {policy: f"scores/{policy}" for policy in (measured.settings.target, measured.settings.behavior)}
    # A baseline needs no behavior policy.
    stages = {
        policy: store.manifest.stages[key] for policy, key in keys.items() if key in store.manifest.stages
    }
    dtypes = {policy: str(stage.settings.get("dtype", "")) for policy, stage in stages.items()}
    audits = {policy: stored_audit(stage) for policy, stage in stages.items()}
    return WeightingStatistics(
        weights=measured.name,
        settings=measured.settings,
        corpus=corpus.statistics,
        sources=[group.statistics for group in sources],
        audits=audits,
        findings=[
            *findings(corpus, sources, measured.settings, dtypes, audits),
            *drift_findings(store, measured.settings),
        ],
    )


def _group(source: str | None, totals: Totals, clips: bool) -> GroupStatistics:
    """`clips` says whether the weighting does, so that there are shares to tell."""
    counted = {
        "source": source,
        "samples": totals.samples,
        "scored_tokens": totals.tokens,
        "statuses": dict(sorted(totals.statuses.items())),
        "negatives": totals.negatives,
    }
    if not totals.tokens:
        lists: dict[str, list[float]] = {"weight_by_decile": [], "by_decile": []}
        empty = dict.fromkeys(set(GroupStatistics.model_fields) - set(counted) - set(lists))
        return GroupStatistics.model_validate({**counted, **empty, **lists})
    deciles = [_decile(totals, tenth, clips) for tenth in range(DECILES)]
    return GroupStatistics.model_validate(
        {
            **counted,
            **_weight_numbers(totals),
            **_policy_numbers(totals),
            **(_ratio_numbers(totals) if totals.log_ratios.total else dict.fromkeys(_RATIO_NUMBERS)),
            **({} if clips else dict.fromkeys(_CLIP_NUMBERS)),
            "weight_by_decile": [tenth.weight_mean for tenth in deciles],
            "by_decile": deciles,
        }
    )


def _weight_numbers(totals: Totals) -> dict[str, float | None]:
    n, weights = totals.tokens, totals.weights
    mean = totals.weight / n
    ess = _ess(totals.weight, totals.weight_square)
    seq_ess = _ess(totals.sample_weight, totals.sample_weight_square)
    return {
        "ess": ess,
        "ess_ratio": None if ess is None else ess / n,
        "seq_ess": seq_ess,
        "seq_ess_ratio": None if seq_ess is None else seq_ess / totals.samples,
        "weight_mean": mean,
        "weight_std": max(totals.weight_square / n - mean**2, 0.0) ** 0.5,
        **_quantiles("weight", weights),
        "top_1pct_mass": weights.top_share(TOP_SHARE),
        "top_1pct_samples_mass": totals.sample_weights.top_share(TOP_SHARE),
        "log_weight_clipped_low": totals.weight_low / n,
        "log_weight_clipped_high": totals.weight_high / n,
        "saturated": (totals.weight_low + totals.weight_high) / n,
    }


def _ess(total: float, square: float) -> float | None:
    """Effective sample size; None where every weight is 0."""
    return total**2 / square if square else None


def _policy_numbers(totals: Totals) -> dict[str, float | None]:
    """Perplexities; the behavior policy's sum is NaN where there is none."""
    target, behavior = -totals.target_logprob / totals.tokens, -totals.behavior_logprob / totals.tokens
    return {
        "ppl_target": bounded_exp(target),
        "ppl_behavior": None if math.isnan(behavior) else bounded_exp(behavior),
    }


def _ratio_numbers(totals: Totals) -> dict[str, float]:
    n = totals.tokens
    kl = (totals.behavior_logprob - totals.target_logprob) / n
    return {
        "log_ratio_mean": -kl,
        **_quantiles("log_ratio", totals.log_ratios),
        "log_ratio_clipped_low": totals.ratio_low / n,
        "log_ratio_clipped_high": totals.ratio_high / n,
        "kl": kl,
        "k3_kl": k3_mean(totals),
        "chi2_token": chi2_mean(totals),
        "chi2_seq": totals.sample_ratio_square / totals.samples - 1,
        "ppl_ratio": bounded_exp(kl),
        "log_ppl_diff": kl,
    }


def _quantiles(prefix: str, histogram: Histogram) -> dict[str, float]:
    values = histogram.quantiles(list(QUANTILES.values())).tolist()
    return {
        f"{prefix}_min": histogram.minimum,
        f"{prefix}_max": histogram.maximum,
        **{f"{prefix}_{name}": value for name, value in zip(QUANTILES, values, strict=True)},
    }


_CLIP_NUMBERS = (
    *("log_ratio_clipped_low", "log_ratio_clipped_high"),
    *("log_weight_clipped_low", "log_weight_clipped_high", "saturated"),
)
_RATIO_NUMBERS = (
    *(f"log_ratio_{name}" for name in ("mean", "min", *QUANTILES, "max", "clipped_low", "clipped_high")),
    *("kl", "k3_kl", "chi2_token", "chi2_seq", "ppl_ratio", "log_ppl_diff"),
)


def _decile(totals: Totals, tenth: int, clips: bool) -> DecileStatistics:
    tokens = int(totals.decile_tokens[tenth])
    if not tokens:
        names = set(DecileStatistics.model_fields) - {"tokens"}
        return DecileStatistics.model_validate({"tokens": 0, **dict.fromkeys(names)})
    ess = _ess(float(totals.decile_weight[tenth]), float(totals.decile_weight_square[tenth]))
    log_ratio = float(totals.decile_target[tenth] - totals.decile_behavior[tenth]) / tokens
    is_known = not math.isnan(log_ratio)
    return DecileStatistics(
        tokens=tokens,
        ess_ratio=None if ess is None else ess / tokens,
        weight_mean=float(totals.decile_weight[tenth]) / tokens,
        log_ratio_mean=log_ratio if is_known else None,
        log_ratio_clipped_low=int(totals.decile_ratio_low[tenth]) / tokens if clips else None,
        log_ratio_clipped_high=int(totals.decile_ratio_high[tenth]) / tokens if clips else None,
        saturated=int(totals.decile_weight_low[tenth] + totals.decile_weight_high[tenth]) / tokens
        if clips
        else None,
        ppl_ratio=bounded_exp(-log_ratio) if is_known else None,
    )
