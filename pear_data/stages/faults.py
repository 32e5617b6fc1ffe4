"""The checks of a weighting's numbers: what is wrong with them, each with the number that shows it and a threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pear_data.config import WeightSettings
from pear_data.stages.measure import Totals

if TYPE_CHECKING:
    from pear_data.stages.statistics import GroupStatistics

# Below a tenth, a step over 1,000 tokens learns from no more than 100 of them would carry.
LOW_ESS_RATIO = 0.1
# The same of samples, where there are enough of them for a tenth to be many.
LOW_SEQ_ESS_RATIO = 0.1
FEW_SAMPLES = 100
# Where most log-ratios are clipped to one value, a suffix sum counts tokens and hardly reads them.
HIGH_CLIPPED = 0.5
# Saturated suffix sums no longer tell tokens apart; the bounds are meant for rare extremes.
HIGH_SATURATED = 0.1
# The default discount alone brings the start of a 2,000-token sample to 0.14 of its end; less is the log-ratios' doing.
LOW_FIRST_TO_LAST = 0.1
# A hundredth of the tokens holding half the weight: the loss follows a handful of outliers.
HIGH_TOP_MASS = 0.5
TOP_SHARE = 0.01
# The mean weight multiplies the learning rate, unless the trainer divides by the sum of weights.
FAR_MEAN = 10.0


@dataclass(frozen=True, slots=True)
class Group:
    """The whole corpus or one source: its diagnostics and the totals they were read off."""

    statistics: GroupStatistics
    totals: Totals


@dataclass(frozen=True, slots=True)
class Fault:
    """What a check found; remedies depend on whether it is the corpus's fault or some sources'."""

    code: str
    value: float
    threshold: float
    text: str


Check = Callable[[Group, WeightSettings], Fault | None]


def _low_ess(group: Group, settings: WeightSettings) -> Fault | None:
    ratio = group.statistics.ess_ratio
    if ratio is None or ratio >= LOW_ESS_RATIO:
        return None
    return Fault(
        "low_ess",
        ratio,
        LOW_ESS_RATIO,
        f"The effective sample size is {percent(ratio)} of the scored tokens: few tokens carry the training signal.",
    )


def _few_sequences(group: Group, settings: WeightSettings) -> Fault | None:
    statistics = group.statistics
    ratio = statistics.seq_ess_ratio
    if ratio is None or ratio >= LOW_SEQ_ESS_RATIO or statistics.samples < FEW_SAMPLES:
        return None
    return Fault(
        "few_sequences",
        ratio,
        LOW_SEQ_ESS_RATIO,
        f"By their mean weights, the effective number of samples is {percent(ratio)} of {statistics.samples:,}, and "
        f"1 % of them hold {percent(statistics.top_1pct_samples_mass or 0)} of all weight: a few samples carry the "
        "loss.",
    )


def _clipped_low(group: Group, settings: WeightSettings) -> Fault | None:
    share = group.statistics.log_ratio_clipped_low
    # Of centered log-ratios about half lie on either side, which is no fault.
    if share is None or share <= HIGH_CLIPPED or settings.center != "none":
        return None
    return Fault(
        "clipped_low",
        share,
        HIGH_CLIPPED,
        f"{percent(share)} of the log-ratios lie below the lower clip {settings.clip_log_ratio[0]:g} (median "
        f"{group.statistics.log_ratio_p50:.3g}): the behavior policy is much surer of its text, and a weight counts "
        "the tokens that follow more than it reads them.",
    )


def _clipped_high(group: Group, settings: WeightSettings) -> Fault | None:
    share = group.statistics.log_ratio_clipped_high
    if share is None or share <= HIGH_CLIPPED or settings.center != "none":
        return None
    return Fault(
        "clipped_high",
        share,
        HIGH_CLIPPED,
        f"{percent(share)} of the log-ratios lie above the upper clip {settings.clip_log_ratio[1]:g} (median "
        f"{group.statistics.log_ratio_p50:.3g}): the target finds the text likelier than the policy that wrote it, "
        "and a weight counts the tokens that follow more than it reads them.",
    )


def _saturated(group: Group, settings: WeightSettings) -> Fault | None:
    share = group.statistics.saturated
    if share is None or share <= HIGH_SATURATED:
        return None
    low, high = settings.clip_log_weight
    at_low = group.totals.weight_low >= group.totals.weight_high
    where = f"lower log-weight clip {low:g}" if at_low else f"upper log-weight clip {high:g}"
    return Fault(
        "saturated",
        share,
        HIGH_SATURATED,
        f"{percent(share)} of the tokens have a saturated weight, mostly at the {where}: their weights no longer "
        "tell them apart.",
    )


def _decays(group: Group, settings: WeightSettings) -> Fault | None:
    known = [weight for weight in group.statistics.weight_by_decile if weight is not None]
    if settings.level == "sequence" or len(known) < 2 or known[0] >= LOW_FIRST_TO_LAST * known[-1]:
        return None
    return Fault(
        "decays_with_position",
        known[0] / known[-1],
        LOW_FIRST_TO_LAST,
        f"The first tenth of a sample has {percent(known[0] / known[-1])} of the mean weight of its last tenth "
        f"({known[0]:.3g} and {known[-1]:.3g}): training sees mostly the ends.",
    )


def _top_heavy(group: Group, settings: WeightSettings) -> Fault | None:
    mass = group.statistics.top_1pct_mass
    if mass is None or mass <= HIGH_TOP_MASS:
        return None
    return Fault(
        "top_heavy",
        mass,
        HIGH_TOP_MASS,
        f"1 % of the tokens hold {percent(mass)} of all weight: a few outliers steer training.",
    )


def _mean_off(group: Group, settings: WeightSettings) -> Fault | None:
    mean = group.statistics.weight_mean
    # That the sources' means differ is what weights are for.
    if group.statistics.source is not None or mean is None or 1 / FAR_MEAN <= mean <= FAR_MEAN:
        return None
    return Fault(
        "weight_mean",
        mean,
        1 / FAR_MEAN if mean < 1 else FAR_MEAN,
        f"The mean weight is {mean:.3g}: where the loss is divided by a number of tokens, the learning rate is in "
        "effect multiplied by it.",
    )


CHECKS: tuple[Check, ...] = (
    _low_ess,
    _few_sequences,
    _clipped_low,
    _clipped_high,
    _saturated,
    _decays,
    _top_heavy,
    _mean_off,
)


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.3g} %"
