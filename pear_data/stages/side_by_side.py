"""The report's comparisons: sources or weightings below each other, with bars and ranges on common scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pear_data.config import BASELINES, WeightSettings
from pear_data.stages.axes import Mark, percent, weight_ticks

if TYPE_CHECKING:
    from pear_data.stages.statistics import GroupStatistics, WeightingStatistics

# Sources compared; the others are said to be left out.
SHOWN_SOURCES = 20
WIDTH, HEIGHT = 220.0, 22.0
_MARGIN = 8.0
_LETTER = 8.0
_LEAST = 1e-12  # a weight of 0 (a probability can be as small) has no place on a logarithmic axis


@dataclass(frozen=True, slots=True)
class Range:
    """Where a group's weights lie, in the units of a box of WIDTH x HEIGHT."""

    p1: float
    p5: float
    p50: float
    p95: float
    p99: float
    mean: float
    title: str


@dataclass(frozen=True, slots=True)
class Row:
    """A group beside others."""

    name: str
    statistics: GroupStatistics
    weights: Range | None
    clipped: tuple[float, float] | None  # shares of the log-ratios past the lower and the upper clip
    whole: bool = False  # the corpus among its sources


@dataclass(frozen=True, slots=True)
class Comparison:
    """Groups below each other. `one` is where a weight of 1 lies, None off the axis."""

    rows: list[Row]
    ticks: list[Mark]
    one: float | None
    left_out: str | None
    has_clips: bool
    has_log_ratios: bool


def compare_sources(
    settings: WeightSettings, corpus: GroupStatistics, sources: Sequence[GroupStatistics]
) -> Comparison:
    """The whole corpus, then its sources by tokens, the largest first, at most SHOWN_SOURCES of them."""
    largest = sorted(sources, key=lambda group: (-group.scored_tokens, group.source))
    shown, others = largest[:SHOWN_SOURCES], largest[SHOWN_SOURCES:]
    left_out = None
    if others:
        tokens = sum(group.scored_tokens for group in others)
        share = percent(tokens / max(1, corpus.scored_tokens))
        left_out = f"{len(others):,} smaller sources with {share} of the tokens are left out"
    groups = [corpus, *shown]
    axis = _axis(groups)
    rows = [
        _row("all sources" if group is corpus else group.source or "", settings, group, axis, group is corpus)
        for group in groups
    ]
    return _comparison(rows, axis, left_out)


def compare_weightings(weightings: Sequence[WeightingStatistics]) -> Comparison:
    """The corpus under several weightings."""
    axis = _axis([one.corpus for one in weightings])
    rows = [_row(one.weights, one.settings, one.corpus, axis) for one in weightings]
    return _comparison(rows, axis, None)


def clipped(settings: WeightSettings, group: GroupStatistics) -> tuple[float, float] | None:
    """Shares of the log-ratios past the clips; None where there are none, or no notice is taken of them."""
    low, high = group.log_ratio_clipped_low, group.log_ratio_clipped_high
    return None if low is None or high is None or settings.level in BASELINES else (low, high)


def _axis(groups: Sequence[GroupStatistics]) -> tuple[float, float]:
    """Ends of the axis of log-weights."""
    ends = [
        math.log(max(value, _LEAST))
        for group in groups
        for value in (group.weight_p5, group.weight_mean, group.weight_p95)
        if value is not None
    ]
    start, end = min(ends, default=0.0), max(ends, default=0.0)
    # Room for what lies beyond the 5 % and 95 % that the axis is made for.
    margin = max(0.1 * (end - start), 0.05)
    return start - margin, end + margin


def _row(
    name: str,
    settings: WeightSettings,
    group: GroupStatistics,
    axis: tuple[float, float],
    whole: bool = False,
) -> Row:
    return Row(name, group, _range(group, axis), clipped(settings, group), whole)


def _comparison(rows: list[Row], axis: tuple[float, float], left_out: str | None) -> Comparison:
    return Comparison(
        rows=rows,
        ticks=_spaced([Mark(_place(tick, axis), f"{tick:g}") for tick in weight_ticks(*axis)]),
        one=_place(1.0, axis) if axis[0] <= 0 <= axis[1] else None,
        left_out=left_out,
        has_clips=any(row.clipped is not None for row in rows),
        has_log_ratios=any(row.statistics.ppl_ratio is not None for row in rows),
    )


def _range(group: GroupStatistics, axis: tuple[float, float]) -> Range | None:
    values = (group.weight_p1, group.weight_p5, group.weight_p50, group.weight_p95, group.weight_p99)
    known = [value for value in (*values, group.weight_mean) if value is not None]
    if len(known) < 6:
        return None
    p1, p5, p50, p95, p99, mean = known
    title = f"1 % {p1:.3g}, 5 % {p5:.3g}, median {p50:.3g}, mean {mean:.3g}, 95 % {p95:.3g}, 99 % {p99:.3g}"
    return Range(
        p1=_place(p1, axis),
        p5=_place(p5, axis),
        p50=_place(p50, axis),
        p95=_place(p95, axis),
        p99=_place(p99, axis),
        mean=_place(mean, axis),
        title=title,
    )


def _place(weight: float, axis: tuple[float, float]) -> float:
    """Where a weight lies in the box, on its edge where it is off the axis."""
    part = (math.log(max(weight, _LEAST)) - axis[0]) / (axis[1] - axis[0])
    return round(_MARGIN + min(max(part, 0.0), 1.0) * (WIDTH - 2 * _MARGIN), 2)


def _spaced(ticks: list[Mark]) -> list[Mark]:
    """As many of the ticks as have room for their labels."""
    kept: list[Mark] = []
    for tick in ticks:
        if not kept or tick.at - kept[-1].at >= _LETTER * max(len(tick.label), len(kept[-1].label), 4):
            kept.append(tick)
    return kept
