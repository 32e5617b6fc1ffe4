"""Diagnostics as a table for people, and as flat rows for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.table import Table

from pear_data.config import WeightSettings
from pear_data.stages.statistics import DecileStatistics, GroupStatistics, WeightingStatistics
from pear_data.stages.text import one_line

ABSENT = "-"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.3g} %"


def _counted(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


def _several(*values: float | None, show: Callable[[float | None], str] = _number) -> str:
    return " / ".join(show(value) for value in values)


def _ends(group: GroupStatistics) -> str:
    known = [weight for weight in group.weight_by_decile if weight is not None]
    return _several(known[0], known[-1]) if known else ABSENT


Show = Callable[[GroupStatistics], str]

# (label, what is shown). Order: how much, how concentrated, the weights, the two policies.
ROWS: tuple[tuple[str, Show], ...] = (
    ("samples", lambda g: _counted(g.samples)),
    ("scored tokens", lambda g: _counted(g.scored_tokens)),
    ("ESS (effective tokens)", lambda g: _counted(g.ess)),
    ("ESS / tokens", lambda g: _share(g.ess_ratio)),
    ("ESS / samples, by sample", lambda g: _share(g.seq_ess_ratio)),
    ("weight mean", lambda g: _number(g.weight_mean)),
    ("weight p5 / p50 / p95", lambda g: _several(g.weight_p5, g.weight_p50, g.weight_p95)),
    ("weight min / max", lambda g: _several(g.weight_min, g.weight_max)),
    ("weight in first / last tenth", _ends),
    ("weight held by top 1 % of tokens", lambda g: _share(g.top_1pct_mass)),
    ("weight held by top 1 % of samples", lambda g: _share(g.top_1pct_samples_mass)),
    (
        "at log-weight clip low / high",
        lambda g: _several(g.log_weight_clipped_low, g.log_weight_clipped_high, show=_share),
    ),
    ("log-ratio p5 / p50 / p95", lambda g: _several(g.log_ratio_p5, g.log_ratio_p50, g.log_ratio_p95)),
    (
        "past log-ratio clip low / high",
        lambda g: _several(g.log_ratio_clipped_low, g.log_ratio_clipped_high, show=_share),
    ),
    ("kl (k1) / k3_kl", lambda g: _several(g.kl, g.k3_kl)),
    ("chi2_token / chi2_seq", lambda g: _several(g.chi2_token, g.chi2_seq)),
    ("perplexity target / behavior", lambda g: _several(g.ppl_target, g.ppl_behavior)),
    ("ppl_ratio", lambda g: _number(g.ppl_ratio)),
)

# What tells sources apart, short enough for one line each.
SOURCE_COLUMNS: tuple[tuple[str, Show], ...] = (
    ("samples", lambda g: _counted(g.samples)),
    ("tokens", lambda g: _counted(g.scored_tokens)),
    ("ESS / tokens", lambda g: _share(g.ess_ratio)),
    ("weight mean", lambda g: _number(g.weight_mean)),
    ("median", lambda g: _number(g.weight_p50)),
    ("clipped low", lambda g: _share(g.log_ratio_clipped_low)),
    ("kl", lambda g: _number(g.kl)),
    ("ppl_ratio", lambda g: _number(g.ppl_ratio)),
)


# The same for tenths of samples.
DECILE_COLUMNS: tuple[tuple[str, Callable[[DecileStatistics], str]], ...] = (
    ("tokens", lambda d: _counted(d.tokens)),
    ("ESS / tokens", lambda d: _share(d.ess_ratio)),
    ("weight mean", lambda d: _number(d.weight_mean)),
    ("log-ratio mean", lambda d: _number(d.log_ratio_mean)),
    ("clipped low", lambda d: _share(d.log_ratio_clipped_low)),
    ("clipped high", lambda d: _share(d.log_ratio_clipped_high)),
    ("saturated", lambda d: _share(d.saturated)),
    ("ppl_ratio", lambda d: _number(d.ppl_ratio)),
)


def described(settings: WeightSettings) -> str:
    """How weights were made, in a line."""
    if settings.level == "uniform":
        return "uniform, as in plain SFT"
    if settings.level == "dft":
        return f"dft, each token's probability under {settings.target}"
    parts = [f"{settings.target} against {settings.behavior}", _level(settings)]
    if settings.level != "sequence":
        parts.append(f"gamma {settings.gamma:g}")
    if settings.center != "none":
        parts.append(f"log-ratios centered by {settings.center}")
    parts.append("log-ratios clipped to [{:g}, {:g}]".format(*settings.clip_log_ratio))
    parts.append("log-weights to [{:g}, {:g}]".format(*settings.clip_log_weight))
    if settings.normalize != "none":
        parts.append(f"mean 1 by {settings.normalize}")
    if settings.per_source:
        parts.append(f"{len(settings.per_source)} sources with settings of their own")
    return ", ".join(parts)


def _level(settings: WeightSettings) -> str:
    if settings.level != "block":
        return f"{settings.level} level"
    if settings.block_by == "tokens":
        return f"blocks of {settings.block_size}"
    if settings.block_by == "regex":
        return f"blocks by {one_line(str(settings.block_regex))}"
    return f"blocks by {settings.block_by}"


def set_aside(group: GroupStatistics) -> str | None:
    """Samples that are not in the numbers, in words; None where there are none."""
    parts = [f"{count:,} {status}" for status, count in group.statuses.items() if status != "ok"]
    kept = group.statuses.get("ok", 0) - group.samples
    if kept:
        parts.append(f"{kept:,} negative")
    return f"not in the numbers: {', '.join(parts)} samples" if parts else None


def statistics_table(found: Sequence[WeightingStatistics]) -> Table:
    """The whole corpus's numbers, a column for each weighting."""
    table = Table(header_style="bold")
    table.add_column("", no_wrap=True)
    for one in found:
        table.add_column(one_line(one.weights), justify="right")
    for label, show in ROWS:
        table.add_row(label, *(show(one.corpus) for one in found))
    return table


def source_table(one: WeightingStatistics) -> Table:
    """One weighting's numbers, a row for each source and one for the whole corpus."""
    table = Table(header_style="bold")
    table.add_column(one_line(one.weights))
    for heading, _ in SOURCE_COLUMNS:
        table.add_column(heading, justify="right")
    for group in (*one.sources, one.corpus):
        name = "all" if group.source is None else one_line(group.source)
        if group is one.corpus:
            table.add_section()
        table.add_row(name, *(show(group) for _, show in SOURCE_COLUMNS))
    return table


def decile_table(one: WeightingStatistics) -> Table:
    """One weighting's numbers, a row for each tenth of the samples by position."""
    table = Table(header_style="bold")
    table.add_column(one_line(one.weights))
    for heading, _ in DECILE_COLUMNS:
        table.add_column(heading, justify="right")
    for tenth, decile in enumerate(one.corpus.by_decile):
        name = f"{10 * tenth} to {10 * tenth + 10} %"
        table.add_row(name, *(show(decile) for _, show in DECILE_COLUMNS))
    return table


def flat_rows(found: Iterable[WeightingStatistics], by: str | None) -> list[dict[str, Any]]:
    """One row per weighting; `by` "source" one for each source of it, "decile" for each tenth of its samples."""
    return [row for one in found for row in _rows_of(one, by)]


def _rows_of(one: WeightingStatistics, by: str | None) -> list[dict[str, Any]]:
    named = {"weights": one.weights}
    if by == "decile":
        return [{**named, "decile": n, **tenth.model_dump()} for n, tenth in enumerate(one.corpus.by_decile)]
    groups = one.sources if by == "source" else [one.corpus]
    return [{**named, **group.model_dump()} for group in groups]


def csv_cell(value: Any) -> Any:
    """A value as CSV holds it: lists and mappings as JSON, null as nothing."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value
