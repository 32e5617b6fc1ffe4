"""Geometry of the report's charts, in the units of their SVG boxes; the template only draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pear_data.stages.histogram import Histogram

WIDTH, HEIGHT = 560.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 14.0, 34.0
BINS = 60
_GAP = 1.0
_LABEL = 60.0  # room a line's label takes

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a chart; `kind` is a class the style sheet colours ("", "clipped", "step3"...)."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A place on an axis with its label."""

    at: float
    label: str


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
    lines: list[Line]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def log_ratio_chart(log_ratios: Histogram, clips: tuple[float, float]) -> Chart:
    """Share of tokens by log-ratio, the clips marked and what lies beyond them set off."""
    low, high = clips
    p1, p99 = log_ratios.quantiles([0.01, 0.99])
    start, end = min(p1, low), max(p99, high)
    margin = 0.04 * (end - start) or 1.0
    # Edges fall on the clips, so that no bar is half clipped.
    edges = _edges_through(start - margin, end + margin, low, high)
    shares = _shares(log_ratios.means, log_ratios.counts, edges)
    middles = (edges[:-1] + edges[1:]) / 2
    kinds = np.where((middles < low) | (middles > high), "clipped", "kept")
    below, above = shares[middles < low].sum(), shares[middles > high].sum()
    scale_x = _scale(edges[0], edges[-1])
    return Chart(
        title="Log-ratios of the tokens",
        summary=f"{below:.0%} of the log-ratios lie below the lower clip {low:g}, {above:.0%} above the upper clip"
        f" {high:g}.",
        x_label="log-ratio: how much likelier the target policy finds the token (natural log)",
        bars=_bars(edges, shares, kinds.tolist(), lambda a, b: f"{a:.3g} to {b:.3g}"),
        x_ticks=[Mark(scale_x(value), f"{value:g}") for value in _nice_ticks(edges[0], edges[-1], 7)],
        y_ticks=_share_ticks(shares),
        lines=[
            Line(scale_x(low), f"clip {low:g}", scale_x(low) > LEFT + _LABEL),
            Line(scale_x(high), f"clip {high:g}", scale_x(high) > WIDTH - RIGHT - _LABEL),
        ],
    )


def log_weight_chart(weights: Histogram, kind_of: Callable[[Floats], list[str]]) -> Chart:
    """Share of tokens by weight on a logarithmic axis; `kind_of(weights)` names the colour class of each bar."""
    logs = np.log(weights.means)
    reach = max(abs(logs[0]), abs(logs[-1]), 0.1)
    start, end = min(logs[0], -0.1 * reach), max(logs[-1], 0.1 * reach)
    margin = 0.02 * (end - start)
    edges = np.linspace(start - margin, end + margin, BINS + 1)
    shares = _shares(logs, weights.counts, edges)
    scale_x = _scale(edges[0], edges[-1])
    ticks = [value for value in _weight_ticks(reach) if edges[0] <= np.log(value) <= edges[-1]]
    kinds = kind_of(np.exp((edges[:-1] + edges[1:]) / 2))
    low, middle, high = weights.quantiles([0.05, 0.5, 0.95])
    return Chart(
        title="Weights of the tokens",
        summary=f"Half of the weights are at most {middle:.3g}; nine in ten lie between {low:.3g} and {high:.3g}.",
        x_label="weight (logarithmic)",
        bars=_bars(edges, shares, kinds, lambda a, b: f"{np.exp(a):.3g} to {np.exp(b):.3g}"),
        x_ticks=[Mark(scale_x(np.log(value)), f"{value:g}") for value in ticks],
        y_ticks=_share_ticks(shares),
        lines=[],
    )


def position_chart(deciles: Sequence[float | None], kind_of: Callable[[Floats], list[str]]) -> Chart:
    """Mean weight in each tenth of the samples, first to last."""
    values = np.array([value or 0.0 for value in deciles])
    edges = np.linspace(0, 100, len(values) + 1)
    top = float(values.max()) or 1.0
    ticks = _nice_ticks(0, top, 4)
    return Chart(
        title="Mean weight by position",
        summary=f"From {values[0]:.3g} in the first tenth of a sample to {values[-1]:.3g} in the last.",
        x_label="position in the sample (% of its scored tokens)",
        bars=_bars(
            edges,
            values,
            kind_of(np.maximum(values, 1e-30)),
            lambda a, b: f"{a:.0f} to {b:.0f} %",
            plain=True,
        ),
        x_ticks=[Mark(_scale(0, 100)(value), f"{value:g}") for value in (0, 25, 50, 75, 100)],
        y_ticks=[Mark(_height(value / top), f"{value:g}") for value in ticks],
        lines=[],
    )


def _shares(values: Floats, counts: npt.NDArray[np.signedinteger], edges: Floats) -> Floats:
    """Share of the counts in each bin; what lies outside counts to the first or last."""
    inside = np.clip(values, edges[0], edges[-1])
    shares: Floats = np.histogram(inside, bins=edges, weights=counts)[0] / counts.sum()
    return shares


def _bars(
    edges: Floats,
    values: Floats,
    kinds: Sequence[str],
    name: Callable[[float, float], str],
    plain: bool = False,
) -> list[Bar]:
    scale_x = _scale(edges[0], edges[-1])
    top = values.max() or 1.0
    bars = []
    for a, b, value, kind in zip(edges[:-1], edges[1:], values.tolist(), kinds, strict=True):
        if value > 0:
            x, y = scale_x(a), _height(value / top)
            width, height = max(scale_x(b) - x - _GAP, 0.5), HEIGHT - BOTTOM - y
            said = f"{value:.4g}" if plain else f"{100 * value:.2g} % of the tokens"
            bars.append(Bar(x, y, round(width, 2), round(height, 2), kind, f"{name(a, b)}: {said}"))
    return bars


def _scale(start: float, end: float) -> Callable[[float], float]:
    return lambda value: round(LEFT + (value - start) / (end - start) * (WIDTH - LEFT - RIGHT), 2)


def _height(part: float) -> float:
    return round(TOP + (1 - part) * (HEIGHT - TOP - BOTTOM), 2)


def _edges_through(start: float, end: float, low: float, high: float) -> Floats:
    """About BINS bins from `start` to `end`, with edges at `low` and `high`."""
    parts = [(start, low), (low, high), (high, end)]
    edges = [start]
    for a, b in parts:
        if b > a:
            count = max(1, round(BINS * (b - a) / (end - start)))
            edges.extend(np.linspace(a, b, count + 1)[1:].tolist())
    return np.asarray(edges)


def _share_ticks(shares: Floats) -> list[Mark]:
    top = float(shares.max())
    return [Mark(_height(value / top), f"{100 * value:g} %") for value in _nice_ticks(0, top, 4)]


def _nice_ticks(start: float, end: float, count: int) -> list[float]:
    """Round numbers from `start` to `end`, about `count` of them."""
    raw = (end - start) / count
    magnitude = 10.0 ** np.floor(np.log10(raw))
    step = next(size * magnitude for size in (1, 2, 2.5, 5, 10) if size * magnitude >= raw)
    first = np.ceil(start / step - 1e-9)
    last = np.floor(end / step + 1e-9)
    # Adding 0 turns -0 into 0.
    return [float(f"{index * step:.6g}") + 0.0 for index in np.arange(first, last + 1)]


def _weight_ticks(reach: float) -> list[float]:
    """Round weights around 1, closer together the less the weights reach from it."""
    if reach > np.log(50):
        return [10.0**power for power in range(-12, 13)]
    if reach > np.log(4):
        return [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
    return [0.25, 0.33, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4]
