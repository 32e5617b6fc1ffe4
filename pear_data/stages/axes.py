"""Axes of the report's charts: the box they are drawn in, places of values in it, and round numbers to mark."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 560.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 16.0, 20.0, 42.0
_LINE = 26.0  # room a label takes from top to bottom


@dataclass(frozen=True, slots=True)
class Mark:
    """A place on an axis with its label."""

    at: float
    label: str


def x_scale(start: float, end: float) -> Callable[[float], float]:
    """Places of values on the horizontal axis."""
    return lambda value: round(float(LEFT + (value - start) / (end - start) * (WIDTH - LEFT - RIGHT)), 2)


def y_place(part: float) -> float:
    """Place on the vertical axis: 0 at the bottom, 1 at the top."""
    return round(TOP + (1 - part) * (HEIGHT - TOP - BOTTOM), 2)


def share_ticks(top: float) -> list[Mark]:
    """Ticks of a vertical axis of shares up to `top`."""
    return [Mark(y_place(value / top), f"{100 * value:g} %") for value in nice_ticks(0, top, 4)]


def root_ticks(top: float) -> list[Mark]:
    """Ticks of a vertical axis of square roots of shares up to `top`, as many as have room."""
    steps = (0.8, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001)
    zero = Mark(y_place(0.0), "0 %")
    ticks: list[Mark] = []
    for value in (step for step in steps if step <= top):
        mark = Mark(y_place(math.sqrt(value / top)), f"{100 * value:g} %")
        if zero.at - mark.at >= _LINE and (not ticks or mark.at - ticks[-1].at >= _LINE):
            ticks.append(mark)
    ticks.append(zero)
    return ticks


def nice_ticks(start: float, end: float, count: int) -> list[float]:
    """Round numbers from `start` to `end`, about `count` of them."""
    raw = (end - start) / count
    magnitude = 10.0 ** np.floor(np.log10(raw))
    step = next(size * magnitude for size in (1, 2, 2.5, 5, 10) if size * magnitude >= raw * (1 - 1e-9))
    first = np.ceil(start / step - 1e-9)
    last = np.floor(end / step + 1e-9)
    # Adding 0 turns -0 into 0.
    return [float(f"{index * step:.6g}") + 0.0 for index in np.arange(first, last + 1)]


def weight_ticks(start: float, end: float) -> list[float]:
    """Round weights whose logarithms lie between `start` and `end`, more of them the closer those are."""
    span = end - start
    if span > np.log(1000):
        powers = np.arange(np.ceil(start / np.log(10)), np.floor(end / np.log(10)) + 1)
        stride = 1 + len(powers) // 9
        ticks = [10.0**power for power in powers if power % stride == 0]
    elif span > np.log(5):
        ticks = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
    elif span > np.log(1.6):
        ticks = [0.25, 0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 4]
    else:
        ticks = [0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.3]
    return [tick for tick in ticks if start <= np.log(tick) <= end]


def percent(share: float | None) -> str:
    """A share in words of a chart."""
    return "-" if share is None else f"{100 * share:.3g} %"
