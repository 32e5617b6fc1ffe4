"""When a weighting has gone wrong, said in words: the number that shows it and the option that mends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from pear_data.config import WeightSettings
from pear_data.stages.noise import HALF, Audit, noise_limit, smaller_clip

if TYPE_CHECKING:
    from pear_data.stages.statistics import GroupStatistics

# Below a tenth, a step over 1,000 tokens learns from no more than 100 of them would carry.
LOW_ESS_RATIO = 0.1
# Where most log-ratios are clipped to one value, a suffix sum counts tokens and hardly reads them.
HIGH_CLIPPED_LOW = 0.5
# Saturated suffix sums no longer tell tokens apart; the bounds are meant for rare extremes.
HIGH_SATURATED = 0.1
# The default discount alone brings the start of a 2,000-token sample to 0.14 of its end; less is the log-ratios' doing.
LOW_FIRST_TO_LAST = 0.1
# A hundredth of the tokens holding half the weight: the loss follows a handful of outliers.
HIGH_TOP_MASS = 0.5
# Weights are 1 at a sample's end; one in a hundred above e means that they grow towards the start.
GROWN_WEIGHT = 2.72
# Log-probs computed in half precision are off by up to about this (nats), as much as the default lower clip; an
# audit measures it.
HALF_PRECISION_NOISE = 0.08
SHOWN_SOURCES = 5


class Finding(BaseModel):
    """One thing that looks wrong with a weighting."""

    model_config = ConfigDict(extra="forbid")

    code: str = Field(description="What is wrong, for programs; stable.")
    value: float = Field(description="The number that shows it.")
    threshold: float = Field(description="Where it starts to look wrong.")
    sources: list[str] = Field(description="Sources it holds for; empty where it holds for the whole corpus.")
    text: str = Field(description="The same for people, with the option that mends it.")


Check = Callable[["GroupStatistics", WeightSettings], Finding | None]


def findings(
    corpus: GroupStatistics,
    sources: Sequence[GroupStatistics],
    settings: WeightSettings,
    dtypes: Mapping[str, str],
    audits: Mapping[str, Audit | None],
) -> list[Finding]:
    """What looks wrong with the whole corpus, and with single sources where the whole looks right.

    Args:
        corpus: diagnostics of the whole corpus.
        sources: the same by source.
        settings: how the weights were made; remedies already in use are not proposed.
        dtypes: precision each policy was scored in, by policy ("" where unknown).
        audits: measured noise of each policy's log-probs, by policy (None where it was not audited).
    """
    found = [*_nothing_left(corpus), *_noise_floor(settings, dtypes, audits)]
    for check in _CHECKS:
        finding = check(corpus, settings)
        if finding is None and len(sources) > 1:
            finding = _in_sources(check, sources, settings)
        if finding is not None:
            found.append(finding)
    return found


def _nothing_left(corpus: GroupStatistics) -> Iterator[Finding]:
    if corpus.samples:
        return
    counts = ", ".join(f"{count:,} {status}" for status, count in corpus.statuses.items())
    yield Finding(
        code="nothing_left",
        value=0,
        threshold=1,
        sources=[],
        text=f"No positive sample has weights ({counts}), so there is nothing to diagnose. Remedy: look at "
        "status_<policy> and label in `pear-data sql 'from samples'`; --negative-scale above 0 trains on negatives.",
    )


def _in_sources(check: Check, sources: Sequence[GroupStatistics], settings: WeightSettings) -> Finding | None:
    """The first source's finding, said of every source that has it."""
    hits = [(group.source, finding) for group in sources if (finding := check(group, settings)) is not None]
    if not hits:
        return None
    names = [str(source) for source, _ in hits]
    shown = ", ".join(names[:SHOWN_SOURCES]) + (", ..." if len(names) > SHOWN_SOURCES else "")
    first = hits[0][1]
    text = f"In {len(names)} of {len(sources)} sources ({shown}): {first.text}"
    return first.model_copy(update={"sources": names, "text": text})


def _low_ess(group: GroupStatistics, settings: WeightSettings) -> Finding | None:
    if group.ess_ratio is None or group.ess_ratio >= LOW_ESS_RATIO:
        return None
    low, high = settings.clip_log_weight
    # Few weights stand out because most have collapsed, or because some have grown: each has its own bound.
    collapsed = (group.weight_p99 or 0.0) <= GROWN_WEIGHT
    bounds = (
        f"--clip-log-weight -2 {high:g} to lift the smallest"
        if collapsed
        else f"--clip-log-weight {low:g} 1 to cap the largest"
    )
    return Finding(
        code="low_ess",
        value=group.ess_ratio,
        threshold=LOW_ESS_RATIO,
        sources=[],
        text=f"The effective sample size is {_percent(group.ess_ratio)} of the scored tokens: few tokens carry "
        f"the training signal. {_remedy(_sequence(settings), bounds)}",
    )


def _clipped_low(group: GroupStatistics, settings: WeightSettings) -> Finding | None:
    if group.log_ratio_clipped_low is None or group.log_ratio_clipped_low <= HIGH_CLIPPED_LOW:
        return None
    return Finding(
        code="clipped_low",
        value=group.log_ratio_clipped_low,
        threshold=HIGH_CLIPPED_LOW,
        sources=[],
        text=f"{_percent(group.log_ratio_clipped_low)} of the log-ratios lie below the lower clip "
        f"{settings.clip_log_ratio[0]:g}: the behavior policy is much surer of its text, and a weight counts the "
        "tokens that follow more than it reads them. "
        + _remedy(_sequence(settings), _slower(settings), "a behavior policy nearer to the target"),
    )


def _saturated(group: GroupStatistics, settings: WeightSettings) -> Finding | None:
    if group.saturated is None or group.saturated <= HIGH_SATURATED:
        return None
    low, high = settings.clip_log_weight
    ratio_low, ratio_high = settings.clip_log_ratio
    at_low = (group.log_weight_clipped_low or 0) >= (group.log_weight_clipped_high or 0)
    where = f"lower log-weight clip {low:g}" if at_low else f"upper log-weight clip {high:g}"
    smaller = f"--clip-log-ratio {ratio_low:g} {ratio_high / 4:g}"
    return Finding(
        code="saturated",
        value=group.saturated,
        threshold=HIGH_SATURATED,
        sources=[],
        text=f"{_percent(group.saturated)} of the tokens have a saturated weight, mostly at the {where}: their "
        f"weights no longer tell them apart. {_remedy(_slower(settings) if at_low else smaller)}",
    )


def _decays(group: GroupStatistics, settings: WeightSettings) -> Finding | None:
    known = [weight for weight in group.weight_by_decile if weight is not None]
    if len(known) < 2 or known[0] >= LOW_FIRST_TO_LAST * known[-1]:
        return None
    discount = "--gamma 1" if settings.level != "sequence" and settings.gamma < 1 else None
    return Finding(
        code="decays_with_position",
        value=known[0] / known[-1],
        threshold=LOW_FIRST_TO_LAST,
        sources=[],
        text=f"The first tenth of a sample has {_percent(known[0] / known[-1])} of the mean weight of its last "
        f"tenth ({known[0]:.3g} and {known[-1]:.3g}): training sees mostly the ends. "
        + _remedy(_sequence(settings), discount, _slower(settings)),
    )


def _top_heavy(group: GroupStatistics, settings: WeightSettings) -> Finding | None:
    if group.top_1pct_mass is None or group.top_1pct_mass <= HIGH_TOP_MASS:
        return None
    low, _ = settings.clip_log_weight
    return Finding(
        code="top_heavy",
        value=group.top_1pct_mass,
        threshold=HIGH_TOP_MASS,
        sources=[],
        text=f"1 % of the tokens hold {_percent(group.top_1pct_mass)} of all weight: a few outliers steer "
        f"training. {_remedy(f'--clip-log-weight {low:g} 1')}",
    )


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
    if assumed and low <= HALF_PRECISION_NOISE:
        yield Finding(
            code="noise_floor",
            value=low,
            threshold=HALF_PRECISION_NOISE,
            sources=[],
            text=f"Log-probs of {' and '.join(assumed)} were computed in half precision and are off by up to about "
            f"{HALF_PRECISION_NOISE:g}, as much as the lower clip {settings.clip_log_ratio[0]:g}, so part of the "
            f"clipping is noise{f' (measured, p99: {known})' if measured else ''}. "
            + _remedy("scoring again with --dtype float32", "measuring it with `pear-data score --audit 16`"),
        )
    elif noise > limit:
        yield Finding(
            code="noise_floor",
            value=noise,
            threshold=limit,
            sources=[],
            text=f"The measured noise of a log-ratio is {noise:.2g} (p99: {known}), "
            f"{_percent(noise / smaller_clip(settings.clip_log_ratio))} of the smaller log-ratio clip, so part of the "
            "clipping is noise. "
            + _remedy("scoring again with --dtype float32" if half else None, "wider --clip-log-ratio"),
        )


_CHECKS: tuple[Check, ...] = (_low_ess, _clipped_low, _saturated, _decays, _top_heavy)


def _sequence(settings: WeightSettings) -> str | None:
    return None if settings.level == "sequence" else "--level sequence"


def _slower(settings: WeightSettings) -> str:
    low, high = settings.clip_log_ratio
    return f"--clip-log-ratio {low / 4:g} {high:g} for smaller sums"


def _remedy(*options: str | None) -> str:
    return f"Remedy: {', or '.join(option for option in options if option)}."


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
