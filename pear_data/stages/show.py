"""One sample in the terminal: its tokens coloured by weight."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pear_data.config import BASELINES, WeightSettings
from pear_data.errors import MismatchError, UsageError
from pear_data.stages.alignment import outdated
from pear_data.stages.clip_marks import HIGH, KEPT, LOW, clip_marks, corpus_mean
from pear_data.stages.colours import STEPS, WeightScale, scale_for
from pear_data.stages.measure import weighting_settings
from pear_data.stages.sample_tokens import SampleTokens, read_sample, weights_of
from pear_data.stages.text import one_line, printable
from pear_data.stages.unweighted import why_unweighted
from pear_data.store import Store
from pear_data.store.shown import default_weighting
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
_TOKEN = 2  # column of the table
_MARKS = {LOW: " ↓", KEPT: "  ", HIGH: " ↑"}


def show(store: Store, sample_id: str, name: str | None, console: Console, *, table: bool = False) -> None:
    """Print a sample's tokens, coloured by weight where the console has colours, and a summary line.

    Args:
        store: an open store.
        sample_id: which sample.
        name: which weighting; by default the one behind the unnamed columns of the views.
        console: where to print; markup must be off.
        table: a row per scored token, with the weights of every weighting, instead of running text.

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
        others = weights_of(views, sample_id) if table else {}
        reason = why_unweighted(store, views, sample_id, sample.status, settings)
    scale = _scale(sample)
    if table:
        current, stale = _current(store, name)
        columns = {other: others[other][1] if other in others else None for other in current}
        marks = None if sample.log_ratios is None else clip_marks(sample, settings, corpus_mean(store, name))
        console.print(_table(sample, marks, columns, scale))
        console.print(_caption(settings, stale), soft_wrap=True)
    else:
        console.print(_coloured(sample, scale), soft_wrap=True)
        if sample.weights is not None and console.color_system is not None:
            console.print(_legend(scale), soft_wrap=True)
    console.print(summary_line(sample, name, reason), soft_wrap=True)


def summary_line(sample: SampleTokens, name: str, reason: str | None) -> str:
    """A sample in one line; `reason` says why it has no weights."""
    parts = [
        f"{one_line(sample.sample_id)} ({one_line(sample.source)})",
        f"{len(sample.tokens)} tokens, {int(sample.loss_mask.sum())} scored",
    ]
    if sample.label < 0:
        parts.append("negative")
    if sample.weights is None or sample.status != "ok":
        parts.append(f"{name} weights: {sample.status}" + (f": {one_line(reason)}" if reason else ""))
    else:
        weights = sample.weights
        parts.append(
            f"{name} weights: mean {weights.mean(dtype=np.float64):.3g}, {weights.min():.3g} to {weights.max():.3g}"
        )
        if sample.ess_ratio is not None:
            parts.append(f"ESS {sample.ess_ratio:.0%} of its tokens")
    return "; ".join(parts)


def _current(store: Store, first: str) -> tuple[list[str], list[str]]:
    """The weightings to show, `first` first, and those made from other log-probs than the store holds now."""
    names = [first, *(name for name in store.manifest.names("weights") if name != first)]
    stale = [name for name in names if outdated(store, f"weights/{name}")]
    return [name for name in names if name not in stale], stale


def _caption(settings: WeightSettings, stale: list[str]) -> str:
    low, high = _MARKS[LOW].strip(), _MARKS[HIGH].strip()
    text = f"log-ratio: {settings.target} minus {settings.behavior}"
    if settings.level not in BASELINES:
        text += f"; {low} below the lower clip, {high} above the upper"
    if settings.center != "none":
        text += f", once the mean of the {settings.center} is subtracted"
    if stale:
        text += f"; left out, since made from other log-probs: {', '.join(stale)}"
    return text


def _scale(sample: SampleTokens) -> WeightScale:
    if sample.weights is None or not sample.weights.any():
        return scale_for(1, 1)
    # A negative's weights are below 0; how far from it is what colours tell.
    sizes = np.abs(sample.weights[sample.weights != 0])
    return scale_for(float(sizes.min()), float(sizes.max()))


def _styles(weights: npt.NDArray[np.float32], scale: WeightScale) -> list[Style]:
    """Style of each weight [T]."""
    return [_style(step) for step in scale.steps(np.abs(weights)).tolist()]


def _style(step: int) -> Style:
    text, background = TERMINAL_COLOURS[step + STEPS]
    return Style(color=text, bgcolor=background)


def _coloured(sample: SampleTokens, scale: WeightScale) -> Text:
    weights = sample.weights
    styles = iter([Style()] * int(sample.loss_mask.sum()) if weights is None else _styles(weights, scale))
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


def _table(
    sample: SampleTokens,
    marks: npt.NDArray[np.int8] | None,
    weightings: dict[str, npt.NDArray[np.float32] | None],
    scale: WeightScale,
) -> Table:
    table = Table(header_style="bold")
    for column, heading in enumerate(("t", "position", "token", "log-ratio", *weightings)):
        table.add_column(heading, justify="left" if column == _TOKEN else "right")
    positions = np.flatnonzero(sample.loss_mask).tolist()
    columns = [_weight_cells(weights, scale, len(positions)) for weights in weightings.values()]
    for t, (position, *weights) in enumerate(zip(positions, *columns, strict=True)):
        log_ratio = ""
        if sample.log_ratios is not None and marks is not None:
            log_ratio = f"{sample.log_ratios[t]:+.4f}{_MARKS[int(marks[t])]}"
        table.add_row(str(t + 1), str(position), Text(one_line(sample.tokens[position])), log_ratio, *weights)
    return table


def _weight_cells(weights: npt.NDArray[np.float32] | None, scale: WeightScale, count: int) -> list[Text]:
    """A cell for each of the `count` scored tokens; empty where the weighting gives the sample no weights."""
    if weights is None:
        return [Text("-")] * count
    styles = _styles(weights, scale)
    return [Text(f"{weight:.4g}", style) for weight, style in zip(weights.tolist(), styles, strict=True)]
