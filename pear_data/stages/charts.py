"""Geometry of the report's bar charts, in the units of their SVG boxes; the template only draws it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pear_data.binning import bins_of, middles_of
from pear_data.stages.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Mark,
    nice_ticks,
    percent,
    root_ticks,
    share_ticks,
    weight_ticks,
    x_scale,
    y_place,
)
from pear_data.stages.histogram import Histogram

BARS = 60
# Of what an axis is too short for, this share of the tokens at either end goes into the first and last bar.
TAIL = 0.001
_LOG_RATIO_TAIL = 0.01
# Bins of a histogram are up to this wide on a logarithmic axis; a bar that is narrower would show their comb.
_BIN_WIDTH = 2.0**-7
_LEAST_REACH = 0.2
# Clips further off than this many times the log-ratios are not on their axis.
_FAR = 10.0
_GAP = 1.0
_LABEL = 76.0  # room a line's label takes

Floats = npt.NDArray[np.float64]
KindOf = Callable[[Floats], list[str]]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a chart; `kind` is a class the style sheet colours ("plain", "clipped", "step3"...)."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str


@dataclass(frozen=True, slots=True)
class Line:
    """A vertical line with a label on its left or right, where there is room."""

    at: float
    label: str
    label_left: bool


@dataclass(frozen=True, slots=True)
class Chart:
    """A bar chart. `summary` says in words what it shows, for those who cannot see it."""

    title: str
    summary: str
    x_label: str
    bars: list[Bar]
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    lines: list[Line] = field(default_factory=list)
    key: list[tuple[str, str]] = field(default_factory=list)  # (kind, what its colour means)
    base: float = HEIGHT - BOTTOM  # where bars start
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def log_ratio_chart(log_ratios: Histogram, clips: tuple[float, float] | None, summary: str) -> Chart:
    """Share of tokens by log-ratio, the clips marked and what lies beyond them set off.

    Most log-ratios lie near 0, and it is the others that matter: heights are square roots of shares.

    Args:
        log_ratios: unclipped log-ratios, at least one.
        clips: where the clips fall on this axis; None where they fall elsewhere for each sample.
        summary: what the clips met, in words.
    """
    start, end = log_ratios.quantiles([_LOG_RATIO_TAIL, 1 - _LOG_RATIO_TAIL]).tolist()
    start, end = min(start, -1e-3), max(end, 1e-3)
    low, high = clips or (-np.inf, np.inf)
    # A clip that is far off (nothing is to be clipped) is no reason to squeeze the log-ratios.
    near = [clip for clip in (low, high) if abs(clip) <= _FAR * max(-start, end)]
    start, end = min([start, *near]), max([end, *near])
    margin = 0.04 * (end - start)
    # Edges fall on the clips, so that no bar is half clipped.
    edges = _edges_through(start - margin, end + margin, sorted(set(near)))
    middles = (edges[:-1] + edges[1:]) / 2
    beyond = (middles < low) | (middles > high)
    shares = _shares(log_ratios, edges)
    scale_x = x_scale(edges[0], edges[-1])
    marks = [(clip, scale_x(clip)) for clip in near]
    return Chart(
        title="Log-ratios of the tokens",
        summary=summary,
        x_label="log-ratio, target minus behavior (nats); heights are square roots",
        bars=_bars(edges, shares, np.where(beyond, "clipped", "plain").tolist(), "{:.3g}".format, math.sqrt),
        x_ticks=[Mark(scale_x(value), f"{value:g}") for value in nice_ticks(edges[0], edges[-1], 7)],
        y_ticks=root_ticks(float(shares.max())),
        lines=[Line(x, f"clip {clip:.3g}", _label_left(clip == low, x)) for clip, x in marks],
        key=[("plain", "as it is"), ("clipped", "counts as the clip")] if near else [],
    )


def weight_chart(weights: Histogram, kind_of: KindOf) -> Chart:
    """Share of tokens by weight on a logarithmic axis; `kind_of(weights)` names the colour class of each bar.

    Weights of 0 (a probability can be as small) are in the first bar.
    """
    least = float(np.finfo(np.float32).tiny)
    start, end = np.log(np.maximum(weights.quantiles([TAIL, 1 - TAIL]), least)).tolist()
    # 1 is on the axis, and weights that hardly differ do not fill it.
    reach = max(abs(start), abs(end), _LEAST_REACH)
    start, end = min(start, -0.1 * reach), max(end, 0.1 * reach)
    if end - start < _LEAST_REACH:
        start, end = -reach, reach
    margin = 0.02 * (end - start)
    start, end = start - margin, end + margin
    bars = min(BARS, int((end - start) / _BIN_WIDTH))
    edges = np.linspace(start, end, bars + bars % 2)  # an odd number, so that 1 is not an edge in the middle
    shares = _shares(weights, np.exp(edges))
    scale_x = x_scale(start, end)
    low, middle, high = weights.quantiles([0.05, 0.5, 0.95])
    return Chart(
        title="Weights of the tokens",
        summary=f"All are {middle:.3g}."
        if weights.minimum == weights.maximum
        else f"Half are at most {middle:.3g}; nine in ten lie between {low:.3g} and {high:.3g}.",
        x_label="weight (logarithmic)",
        bars=_bars(
            edges, shares, kind_of(np.exp((edges[:-1] + edges[1:]) / 2)), lambda v: f"{np.exp(v):.3g}"
        ),
        x_ticks=[Mark(scale_x(np.log(value)), f"{value:g}") for value in weight_ticks(start, end)],
        y_ticks=share_ticks(float(shares.max())),
    )


def _label_left(is_low: bool, x: float) -> bool:
    return x > LEFT + _LABEL if is_low else x > WIDTH - RIGHT - _LABEL


def _shares(values: Histogram, edges: Floats) -> Floats:
    """Share of the values between neighbouring edges; what lies outside counts to the first or last bar.

    The values of a bin are taken to be spread evenly over it, or bars about as wide as bins would show a comb.
    """
    bins = bins_of(values.means.astype(np.float32))
    middles = middles_of(bins)
    below = np.maximum((middles_of(bins - 1) + middles) / 2, values.minimum)
    above = np.minimum((middles + middles_of(bins + 1)) / 2, values.maximum)
    inner = edges[1:-1, None]
    # Where all values of a bin are one, it has no width and is passed at once.
    width = np.where(above > below, above - below, 1.0)
    passed = np.where(above > below, np.clip((inner - below) / width, 0, 1), inner >= below)
    shares = values.counts / values.counts.sum()
    cumulative = np.concatenate(([0.0], passed @ shares, [1.0]))
    found: Floats = np.maximum(np.diff(cumulative), 0.0)
    return found


def _bars(
    edges: Floats,
    shares: Floats,
    kinds: Sequence[str],
    name: Callable[[float], str],
    height: Callable[[float], float] = float,
) -> list[Bar]:
    """Bars whose heights go as `height` of their shares; `name` says an edge."""
    scale_x = x_scale(edges[0], edges[-1])
    top = height(float(shares.max()))
    last = len(shares) - 1
    bars = []
    for index, (share, kind) in enumerate(zip(shares.tolist(), kinds, strict=True)):
        if share < 1e-9:
            continue
        a, b = float(edges[index]), float(edges[index + 1])
        x, y = scale_x(a), y_place(height(share) / top)
        ends = (
            f"up to {name(b)}"
            if index == 0
            else f"from {name(a)}"
            if index == last
            else f"{name(a)} to {name(b)}"
        )
        width = round(max(scale_x(b) - x - _GAP, 0.5), 2)
        title = f"{ends}: {percent(share)} of the tokens"
        bars.append(Bar(x, y, width, round(HEIGHT - BOTTOM - y, 2), kind, title))
    return bars


def _edges_through(start: float, end: float, fixed: Sequence[float]) -> Floats:
    """About BARS bars from `start` to `end`, with edges at each of `fixed`."""
    edges = [start]
    for a, b in zip([start, *fixed], [*fixed, end], strict=True):
        if b > a:
            count = max(1, round(BARS * (b - a) / (end - start)))
            edges.extend(np.linspace(a, b, count + 1)[1:].tolist())
    return np.asarray(edges)
