"""A comparison of weightings as tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.table import Table

from pear_data.stages.compare import Comparison, PairComparison
from pear_data.stages.statistics import WeightingStatistics
from pear_data.stages.statistics_text import ABSENT, described, statistics_table
from pear_data.stages.text import one_line


def comparison_tables(found: Comparison) -> Iterator[Table | str]:
    """Tables and lines, in the order to print them; what comes from the corpus is made safe for a terminal."""
    yield statistics_table(found.weightings)
    for one in found.weightings:
        yield f"{one.weights}: {described(one.settings)}{_wrong(one)}"
    yield (
        f"compared on {found.samples:,} samples ({found.scored_tokens:,} scored tokens) with label 1 that have weights "
        "in all of them"
    )
    # Titles are lines of their own: a table would break them to its width.
    yield "rank correlation (Spearman)"
    yield _correlations(found)
    for pair in found.pairs:
        both = f"{pair.first} and {pair.second}"
        if pair.samples:
            yield f"where {both} disagree most: samples, by mean weight"
            yield _samples(pair)
        if pair.tokens:
            yield f"where {both} disagree most: tokens, one of a sample"
            yield _tokens(pair)
        if not pair.samples and not pair.tokens:
            yield f"{both} disagree nowhere"


def _wrong(one: WeightingStatistics) -> str:
    count = len(one.findings)
    return (
        f"; {count} {'thing looks' if count == 1 else 'things look'} wrong, see `pear-data stats`"
        if count
        else ""
    )


def _correlations(found: Comparison) -> Table:
    table = Table(header_style="bold")
    table.add_column("")
    for heading in ("tokens", "samples"):
        table.add_column(heading, justify="right")
    for pair in found.pairs:
        shown = (pair.token_rank_correlation, pair.sample_rank_correlation)
        table.add_row(
            f"{pair.first}, {pair.second}",
            *(ABSENT if value is None else f"{value:.3f}" for value in shown),
        )
    return table


def _table(pair: PairComparison, *columns: str) -> Table:
    table = Table(header_style="bold")
    for heading in columns:
        table.add_column(heading, justify="right" if heading == "t" else "left", overflow="fold")
    for heading in (pair.first, pair.second, "ratio / usual"):
        table.add_column(heading, justify="right")
    return table


def _samples(pair: PairComparison) -> Table:
    table = _table(pair, "sample", "source")
    for sample in pair.samples:
        table.add_row(
            one_line(sample.sample_id),
            one_line(sample.source),
            f"{sample.first_weight_mean:.3g}",
            f"{sample.second_weight_mean:.3g}",
            _times(sample.log_difference),
        )
    return table


def _tokens(pair: PairComparison) -> Table:
    table = _table(pair, "sample", "source", "t", "token")
    for token in pair.tokens:
        table.add_row(
            one_line(token.sample_id),
            one_line(token.source),
            str(token.t),
            one_line(token.token),
            f"{token.first_weight:.3g}",
            f"{token.second_weight:.3g}",
            _times(token.log_difference),
        )
    return table


def _times(log_difference: float) -> str:
    """By which factor the first weighting favours it over the second, their usual factor taken out."""
    # Beyond it a factor has more digits than anybody reads, and a float none left.
    return f"{math.exp(log_difference):.3g} x" if abs(log_difference) < 100 else f"e^{log_difference:.0f} x"
