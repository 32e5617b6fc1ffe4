"""The report's charts by position: what a weighting does in each tenth of the samples, first to last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pear_data.stages.axes import Mark, nice_ticks, percent, share_ticks, x_scale, y_place
from pear_data.stages.charts import Bar, Chart, KindOf

if TYPE_CHECKING:
    from pear_data.stages.statistics import DecileStatistics

_GAP = 2.0
_X_LABEL = "position in the sample (% of its scored tokens)"


def position_charts(tenths: Sequence[DecileStatistics], kind_of: KindOf, *, has_clips: bool) -> list[Chart]:
    """The charts there are numbers for; `kind_of(weights)` names the colour class of each weight.

    `has_clips` is false for a baseline, which clips no log-ratio.
    """
    charts = [_mean_weights(tenths, kind_of), _effective(tenths)]
    if any(tenth.log_ratio_mean is not None for tenth in tenths):
        charts += [_clipped(tenths), _log_ratios(tenths)] if has_clips else [_log_ratios(tenths)]
    return charts


def _mean_weights(tenths: Sequence[DecileStatistics], kind_of: KindOf) -> Chart:
    values = [tenth.weight_mean for tenth in tenths]
    top = _top(values)
    known = [value for value in values if value is not None]
    kinds = kind_of(np.array([value or 1.0 for value in values]))
    return Chart(
        title="Mean weight by position",
        summary=f"From {known[0]:.3g} in the first tenth of a sample to {known[-1]:.3g} in the last.",
        x_label=_X_LABEL,
        bars=[
            _bar(index, 0.0, value / top, kinds[index], f"{value:.4g}")
            for index, value in enumerate(values)
            if value is not None
        ],
        x_ticks=_x_ticks(),
        y_ticks=[Mark(y_place(value / top), f"{value:g}") for value in nice_ticks(0, top, 4)],
    )


def _effective(tenths: Sequence[DecileStatistics]) -> Chart:
    values = [tenth.ess_ratio for tenth in tenths]
    known = [value for value in values if value is not None]
    summary = (
        f"ESS / tokens is least, {percent(min(known))}, {_place(values.index(min(known)))} through a sample."
        if known and min(known) < 0.9995 * max(known)
        else f"ESS / tokens is {percent(known[0])} throughout."
        if known
        else "No weight is above 0."
    )
    return Chart(
        title="Effective sample size by position",
        summary=summary,
        x_label=_X_LABEL,
        bars=[
            _bar(index, 0.0, value, "plain", f"ESS / tokens {percent(value)}")
            for index, value in enumerate(values)
            if value is not None
        ],
        x_ticks=_x_ticks(),
        y_ticks=share_ticks(1.0),
    )


def _clipped(tenths: Sequence[DecileStatistics]) -> Chart:
    low = [tenth.log_ratio_clipped_low or 0.0 for tenth in tenths]
    high = [tenth.log_ratio_clipped_high or 0.0 for tenth in tenths]
    both = np.add(low, high)
    bars = []
    for index, (below, above) in enumerate(zip(low, high, strict=True)):
        bars.append(_bar(index, 0.0, below, "low", f"below the lower clip: {percent(below)}"))
        bars.append(_bar(index, below, below + above, "high", f"above the upper clip: {percent(above)}"))
    return Chart(
        title="Clipped log-ratios by position",
        summary=f"Between {percent(float(both.min()))} and {percent(float(both.max()))} of a tenth's tokens.",
        x_label=_X_LABEL,
        bars=[bar for bar in bars if bar.height > 0],
        x_ticks=_x_ticks(),
        y_ticks=share_ticks(1.0),
        key=[("low", "below the lower clip"), ("high", "above the upper clip")],
    )


def _log_ratios(tenths: Sequence[DecileStatistics]) -> Chart:
    values = [tenth.log_ratio_mean for tenth in tenths]
    known = [value for value in values if value is not None]
    start, end = min(0.0, *known), max(0.0, *known)
    if start == end:
        start, end = -1e-3, 1e-3
    span = end - start
    return Chart(
        title="Mean log-ratio by position",
        summary=f"From {known[0]:+.3g} in the first tenth to {known[-1]:+.3g} in the last, unclipped.",
        x_label=_X_LABEL,
        bars=[
            _bar(
                index,
                (min(0.0, value) - start) / span,
                (max(0.0, value) - start) / span,
                "low" if value < 0 else "high",
                f"{value:+.4g}",
            )
            for index, value in enumerate(values)
            if value is not None
        ],
        x_ticks=_x_ticks(),
        y_ticks=[Mark(y_place((value - start) / span), f"{value:g}") for value in nice_ticks(start, end, 4)],
        base=y_place(-start / span),
    )


def _bar(index: int, start: float, end: float, kind: str, said: str) -> Bar:
    """The bar of a tenth, from `start` to `end` of the height."""
    scale_x = x_scale(0, 10)
    x, y = scale_x(index), y_place(end)
    width = scale_x(index + 1) - x - _GAP
    return Bar(
        x + _GAP / 2, y, round(width, 2), round(y_place(start) - y, 2), kind, f"{_place(index)}: {said}"
    )


def _place(index: int) -> str:
    return f"{10 * index} to {10 * index + 10} %"


def _top(values: Sequence[float | None]) -> float:
    return max((value for value in values if value is not None), default=1.0) or 1.0


def _x_ticks() -> list[Mark]:
    return [Mark(x_scale(0, 100)(value), f"{value:g}") for value in (0, 25, 50, 75, 100)]
