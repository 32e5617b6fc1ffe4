"""When a weighting has gone wrong, said in words: the number that shows it and what mends it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from pear_data.config import BASELINES, WeightSettings
from pear_data.stages import clips
from pear_data.stages import remedies as mend
from pear_data.stages.faults import CHECKS, HIGH_TOP_MASS, LOW_ESS_RATIO, TOP_SHARE, Check, Group, percent
from pear_data.stages.measure import Totals
from pear_data.stages.noise import HALF, NOISY_SHARE, Audit, noise_limit, smaller_clip
from pear_data.stages.remedies import Remedy

if TYPE_CHECKING:
    from pear_data.stages.statistics import GroupStatistics

# Log-probs computed in half precision are off by up to about this (nats), as much as the default lower clip; an
# audit measures it.
HALF_PRECISION_NOISE = 0.08
# Remedies aim this many times beyond a threshold, not at it.
MARGIN = 2.0
SHOWN_SOURCES = 5
# No more sources are looked at one by one, the largest: each takes milliseconds.
MOST_SOURCES = 100


class Finding(BaseModel):
    """One thing that looks wrong with a weighting."""

    model_config = ConfigDict(extra="forbid")

    code: str = Field(description="What is wrong, for programs; stable.")
    value: float = Field(description="The number that shows it.")
    threshold: float = Field(description="Where it starts to look wrong.")
    sources: list[str] = Field(description="Sources it holds for; empty where it holds for the whole corpus.")
    text: str = Field(description="The same for people, with what mends it.")
    remedies: list[Remedy] = Field(description="What mends it, the best first.")

    @classmethod
    def of(
        cls,
        code: str,
        value: float,
        threshold: float,
        fault: str,
        remedies: Sequence[Remedy],
        sources: Sequence[str] = (),
    ) -> Finding:
        """A finding whose text is what is wrong (`fault`, in whole sentences) and the remedies."""
        text = f"{fault} Remedy: {', or '.join(remedy.text for remedy in remedies)}."
        return cls(
            code=code,
            value=value,
            threshold=threshold,
            sources=list(sources),
            text=text,
            remedies=list(remedies),
        )


def findings(
    corpus: Group,
    sources: Sequence[Group],
    settings: WeightSettings,
    dtypes: Mapping[str, str],
    audits: Mapping[str, Audit | None],
) -> list[Finding]:
    """What looks wrong with the whole corpus, and with single sources.

    Args:
        corpus: the whole corpus.
        sources: each source; the MOST_SOURCES largest are looked at.
        settings: how the weights were made; remedies already in use are not proposed.
        dtypes: precision each policy was scored in, by policy ("" where unknown).
        audits: measured noise of each policy's log-probs, by policy (None where it was not audited).
    """
    if not corpus.statistics.samples:
        return [_nothing_left(corpus.statistics)]
    if settings.level in BASELINES:
        return []  # They are what weights are held against; no option of theirs would mend anything.
    found = [*_noise_floor(settings, dtypes, audits)]
    if len(sources) > MOST_SOURCES:
        sources = sorted(sources, key=lambda group: -group.statistics.scored_tokens)[:MOST_SOURCES]
    by_name = {str(group.statistics.source): group for group in sources}
    for check in CHECKS:
        found += _found(check, corpus, by_name, settings)
    return found


def _found(
    check: Check, corpus: Group, sources: Mapping[str, Group], settings: WeightSettings
) -> Iterator[Finding]:
    """A fault of the whole corpus, of some sources, or of the whole because of some sources."""
    fault = check(corpus, settings)
    faults = {
        name: found
        for name, group in sources.items()
        if (found := check(group, mend.of_source(settings, name))) is not None
    }
    shown = ", ".join(list(faults)[:SHOWN_SOURCES]) + (", ..." if len(faults) > SHOWN_SOURCES else "")
    largest = "largest " if len(sources) == MOST_SOURCES else ""
    some = f"{len(faults)} of {len(sources)} {largest}sources ({shown})"
    hits = {name: sources[name] for name in faults}
    if fault is not None and len(faults) in (0, len(sources)):
        remedies = _corpus_remedies(fault.code, corpus, sources, settings)
        yield Finding.of(fault.code, fault.value, fault.threshold, fault.text, remedies)
    elif fault is not None:
        remedies = _source_remedies(fault.code, corpus, hits, sources, settings)
        text = f"{fault.text} It is so in {some}."
        yield Finding.of(fault.code, fault.value, fault.threshold, text, remedies)
    elif faults:
        first = next(iter(faults.values()))
        remedies = _source_remedies(first.code, corpus, hits, sources, settings)
        text = f"In {some}: {first.text}"
        yield Finding.of(first.code, first.value, first.threshold, text, remedies, list(faults))


def _nothing_left(corpus: GroupStatistics) -> Finding:
    counts = ", ".join(f"{count:,} {status}" for status, count in corpus.statuses.items())
    return Finding.of(
        "nothing_left",
        0,
        1,
        f"No positive sample has weights ({counts}), so there is nothing to diagnose.",
        [
            mend.in_words(
                "look at status_<policy> and label in `pear-data sql 'from samples'`; --negative-scale above 0 trains "
                "on negatives"
            )
        ],
    )


def _corpus_remedies(
    code: str, corpus: Group, sources: Mapping[str, Group], settings: WeightSettings
) -> list[Remedy]:
    """Against a fault of the whole corpus; the best first."""
    totals, has_own = corpus.totals, bool(settings.per_source)
    balance = mend.balance_sources(_totals(sources), settings) if has_own else mend.balance(totals, settings)
    # What a clip of the weights leaves can be told from their histogram, unless they were scaled afterwards.
    can_clip = settings.normalize == "none" and not has_own
    if code == "weight_mean":
        return [mend.normalize("corpus", "the mean becomes 1, and ratios stay")]
    remedies = [balance]
    if code == "low_ess" and can_clip:
        remedies.append(mend.bound_weights(totals.weights, settings, MARGIN * LOW_ESS_RATIO))
    elif code == "few_sequences":
        remedies = [*_even_samples(settings), balance]
    elif code in ("clipped_low", "clipped_high"):
        remedies.append(mend.NEARER)
    elif code == "saturated" and not has_own:
        remedies.append(mend.damp(totals, settings))
    elif code == "decays_with_position":
        remedies = [*_undiscounted(totals, settings), balance, *_one_weight_a_sample(settings)]
    elif code == "top_heavy" and can_clip:
        remedies.append(mend.cap_weights([totals.weights], settings, HIGH_TOP_MASS / MARGIN, TOP_SHARE))
    return [remedy for remedy in remedies if mend.changes(remedy, settings)] or [mend.NEARER]


def _source_remedies(
    code: str,
    corpus: Group,
    hits: Mapping[str, Group],
    sources: Mapping[str, Group],
    settings: WeightSettings,
) -> list[Remedy]:
    """Against a fault of some sources: what leaves the others as they are comes first, where there is such a thing."""
    balance = mend.balance_sources(_totals(sources), settings)
    if code in ("low_ess", "saturated", "decays_with_position"):
        return [*_damped_alone(hits, sources, settings), balance]
    if code == "few_sequences":
        return [*_even_samples(settings), balance]
    if code == "top_heavy" and settings.normalize == "none" and not settings.per_source:
        # Capping these alone would leave the loss to the largest weights of the others.
        histograms = [group.totals.weights for group in (corpus, *hits.values())]
        return [balance, mend.cap_weights(histograms, settings, HIGH_TOP_MASS / MARGIN, TOP_SHARE)]
    return [balance]


def _damped_alone(
    hits: Mapping[str, Group], sources: Mapping[str, Group], settings: WeightSettings
) -> list[Remedy]:
    """Smaller sums in some sources alone, where weights of about 1 there will not leave the loss to the others."""
    others = [group.totals for name, group in sources.items() if name not in hits]
    tokens = sum(group.totals.tokens for group in hits.values())
    weight = sum(totals.weight for totals in others) + tokens
    square = sum(totals.weight_square for totals in others) + tokens
    ess_ratio = weight**2 / square / (sum(totals.tokens for totals in others) + tokens)
    if settings.normalize != "none" or ess_ratio < MARGIN * LOW_ESS_RATIO:
        return []
    return [mend.damp_sources(_totals(hits), settings)]


def _totals(groups: Mapping[str, Group]) -> dict[str, Totals]:
    return {name: group.totals for name, group in groups.items()}


def _even_samples(settings: WeightSettings) -> list[Remedy]:
    """Samples of one mean weight, where the level lets them differ inside."""
    if settings.level == "sequence" or settings.normalize == "sample":
        return []
    return [mend.normalize("sample", "every sample has a mean of 1")]


def _one_weight_a_sample(settings: WeightSettings) -> list[Remedy]:
    """The sequence level, unless blocks by a regular expression, which no option undoes, stand in its way."""
    return [] if settings.block_by == "regex" else [mend.one_weight_a_sample(settings)]


def _undiscounted(totals: Totals, settings: WeightSettings) -> list[Remedy]:
    """No discount, where that and not the log-ratios is what makes weights decay."""
    drift = clips.mean_clipped(totals, settings.clip_log_ratio)
    if settings.gamma == 1 or settings.center != "none" or drift * clips.length(totals) < -1 / MARGIN:
        return []
    return [Remedy(options=["--gamma", "1"], text="--gamma 1 (no discount by position)")]


def _noise_floor(
    settings: WeightSettings, dtypes: Mapping[str, str], audits: Mapping[str, Audit | None]
) -> Iterator[Finding]:
    """Noise of the log-ratios next to the clips: as audits measured it, or assumed of half precision."""
    measured = {policy: audit.p99 for policy, audit in audits.items() if audit is not None}
    half = [policy for policy, dtype in dtypes.items() if dtype in HALF]
    assumed = [policy for policy in half if policy not in measured]
    low, limit = abs(settings.clip_log_ratio[0]), noise_limit(settings.clip_log_ratio)
    # Errors of two policies are independent: their squares add up.
    noise = math.hypot(*measured.values())
    known = ", ".join(
        f"{policy} {measured[policy]:.2g}" if policy in measured else f"{policy} not audited"
        for policy in audits
    )
    again = mend.in_words("scoring again with --dtype float32")
    # Wider clips of centered log-ratios would not balance, and make weights drift.
    can_widen = settings.center == "none"
    if assumed and low <= HALF_PRECISION_NOISE:
        yield Finding.of(
            "noise_floor",
            low,
            HALF_PRECISION_NOISE,
            f"Log-probs of {' and '.join(assumed)} were computed in half precision and are off by up to about "
            f"{HALF_PRECISION_NOISE:g}, as much as the lower clip {settings.clip_log_ratio[0]:g}, so part of the "
            f"clipping is noise{f' (measured, p99: {known})' if measured else ''}.",
            [
                again,
                mend.in_words("measuring it with `pear-data score --audit 16`"),
                *([mend.widen(settings, HALF_PRECISION_NOISE / NOISY_SHARE)] if can_widen else []),
            ],
        )
    elif noise > limit:
        yield Finding.of(
            "noise_floor",
            noise,
            limit,
            f"The measured noise of a log-ratio is {noise:.2g} (p99: {known}), "
            f"{percent(noise / smaller_clip(settings.clip_log_ratio))} of the smaller log-ratio clip, so part of the "
            "clipping is noise.",
            [
                *([again] if half or not can_widen else []),
                *([mend.widen(settings, noise / NOISY_SHARE)] if can_widen else []),
            ],
        )
