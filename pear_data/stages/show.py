"""One sample in the terminal: its tokens coloured by weight."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pear_data.errors import MismatchError, UsageError
from pear_data.stages.alignment import outdated
from pear_data.stages.colours import STEPS, WeightScale, scale_for
from pear_data.stages.measure import weighting_settings
from pear_data.stages.sample_tokens import SampleTokens, read_sample
from pear_data.stages.text import one_line, printable
from pear_data.store import Store
from pear_data.store.view_sql import default_weighting
from pear_data.store.views import connect

# From -STEPS to STEPS: (text, background).
TERMINAL_COLOURS = (
    ("#ffffff", "#2c6aa8"),
    ("#000000", "#6ba6d6"),
    ("#000000", "#a3cbe8"),
    ("#000000", "#d3e6f4"),
    ("#000000", "#f1efe9"),
    ("#000000", "#fce0bb"),
    ("#000000", "#fbc07a"),
    ("#000000", "#ef9436"),
    ("#ffffff", "#b85307"),
)
PROMPT = Style(dim=True)


def show(store: Store, sample_id: str, name: str | None, console: Console, *, table: bool = False) -> None:
    """Print a sample's tokens, coloured by weight where the console has colours, and a summary line.

    Args:
        store: an open store.
        sample_id: which sample.
        name: which weighting; by default the one behind the unnamed columns of the views.
        console: where to print; markup must be off.
        table: a row per scored token instead of running text.

    Raises:
        UsageError: there is no such sample or weighting, or no weighting at all.
        MismatchError: the weighting was made from other log-probs than the store holds now.
    """
    name = name or default_weighting(store.manifest)
    if name is None:
        raise UsageError(f"{store.path} has no weights yet: make some with `pear-data weight`")
    settings = weighting_settings(store, name)
    if fault := outdated(store, f"weights/{name}"):
        raise MismatchError(fault)
    with connect(store) as views:
        sample = read_sample(views, sample_id, settings)
    scale = _scale(sample)
    if table:
        console.print(_table(sample, scale))
    else:
        console.print(_coloured(sample, scale), soft_wrap=True)
        if sample.weights is not None and console.color_system is not None:
            console.print(_legend(scale), soft_wrap=True)
    console.print(summary_line(sample, name), soft_wrap=True)


def summary_line(sample: SampleTokens, name: str) -> str:
    """A sample in one line."""
    parts = [
        f"{one_line(sample.sample_id)} ({one_line(sample.source)})",
        f"{len(sample.tokens)} tokens, {int(sample.loss_mask.sum())} scored",
    ]
    if sample.label < 0:
        parts.append("negative")
    if sample.weights is None or sample.status != "ok":
        parts.append(f"{name} weights: {sample.status}")
    else:
        weights = sample.weights
        parts.append(
            f"{name} weights: mean {weights.mean(dtype=np.float64):.3g}, {weights.min():.3g} to {weights.max():.3g}"
        )
        if sample.ess_ratio is not None:
            parts.append(f"ESS {sample.ess_ratio:.0%} of its tokens")
    return "; ".join(parts)


def _scale(sample: SampleTokens) -> WeightScale:
    if sample.weights is None or not (sample.weights > 0).any():
        return scale_for(1, 1)
    positive = sample.weights[sample.weights > 0]
    return scale_for(float(positive.min()), float(positive.max()))


def _styles(sample: SampleTokens, scale: WeightScale) -> list[Style]:
    """Style of each scored token."""
    if sample.weights is None:
        return [Style()] * int(sample.loss_mask.sum())
    return [_style(step) for step in scale.steps(sample.weights).tolist()]


def _style(step: int) -> Style:
    text, background = TERMINAL_COLOURS[step + STEPS]
    return Style(color=text, bgcolor=background)


def _coloured(sample: SampleTokens, scale: WeightScale) -> Text:
    styles = iter(_styles(sample, scale))
    text = Text()
    for token, scored in zip(sample.tokens, sample.loss_mask.tolist(), strict=True):
        style = next(styles) if scored else PROMPT
        # A background must not run on to the edge of the terminal, so line ends are shown and left uncoloured.
        for index, line in enumerate(printable(token).split("\n")):
            if index:
                text.append("⏎", style).append("\n")
            text.append(line, style)
    return text


def _legend(scale: WeightScale) -> Text:
    text = Text("weight ")
    for step in range(-STEPS, STEPS + 1):
        text.append(f" {scale.label(step)} ", _style(step))
    return text.append("  prompt", PROMPT)


def _table(sample: SampleTokens, scale: WeightScale) -> Table:
    table = Table(header_style="bold")
    for heading in ("t", "position", "token", "log-ratio", "weight"):
        table.add_column(heading, justify="left" if heading == "token" else "right")
    positions = np.flatnonzero(sample.loss_mask).tolist()
    for t, (position, style) in enumerate(zip(positions, _styles(sample, scale), strict=True)):
        log_ratio = "" if sample.log_ratios is None else f"{sample.log_ratios[t]:+.4f}"
        weight = "" if sample.weights is None else f"{sample.weights[t]:.4g}"
        token = Text(one_line(sample.tokens[position]))
        table.add_row(str(t + 1), str(position), token, log_ratio, Text(weight, style))
    return table
