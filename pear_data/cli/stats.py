"""`pear-data stats`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pear_data.cli.options import common_options

if TYPE_CHECKING:
    from pear_data.stages.statistics import WeightingStatistics


@click.command("stats", short_help="Diagnose the weights: how concentrated, how clipped, how far apart.")
@click.option("--weights", multiple=True, metavar="NAME", help="Weighting; repeatable. Default: all.")
@click.option(
    "--by",
    type=click.Choice(["source", "decile"]),
    help="Numbers of each source beside the whole corpus; or of each tenth of the samples by position.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "jsonl", "csv"]),
    envvar="PEAR_STATS_FORMAT",
    default="table",
    show_default=True,
    help="json: everything, nested; jsonl and csv: a flat row per weighting (or source, or decile).",
)
@common_options
def command(store: Path, weights: tuple[str, ...], by: str | None, form: str) -> None:
    """Show the diagnostics of each weighting and say in words what looks wrong.

    ESS is the effective sample size: how many equally weighted tokens would carry as much signal. What looks wrong
    comes with the options of `pear-data weight` that mend it, the best first.

    \b
    Examples:
      pear-data stats
      pear-data stats --weights block --by source
      pear-data stats --by decile
      pear-data stats --format json | jq '.[0].corpus.ess_ratio'
    """
    from pear_data.stages.statistics import statistics
    from pear_data.store import open_store

    found = statistics(open_store(store), weights)
    if form == "table":
        _print_tables(found, by)
    else:
        _print_rows(found, form, by)


def _print_tables(found: list[WeightingStatistics], by: str | None) -> None:
    import sys

    from rich.console import Console

    from pear_data.stages.sql import UNLIMITED_WIDTH
    from pear_data.stages.statistics_text import (
        decile_table,
        described,
        set_aside,
        source_table,
        statistics_table,
    )
    from pear_data.stages.text import one_line

    width = None if sys.stdout.isatty() else UNLIMITED_WIDTH
    console = Console(markup=False, highlight=False, emoji=False, width=width)
    parts = {"source": source_table, "decile": decile_table}
    for table in [parts[by](one) for one in found] if by else [statistics_table(found)]:
        console.print(table)
    for one in found:
        console.print(f"{one.weights}: {described(one.settings)}", soft_wrap=True)
        if aside := set_aside(one.corpus):
            console.print(f"  {aside}", soft_wrap=True)
        for finding in one.findings:
            console.print(f"  ! {one_line(finding.text)}", soft_wrap=True)
        if not one.findings:
            console.print("  nothing looks wrong", soft_wrap=True)


def _print_rows(found: list[WeightingStatistics], form: str, by: str | None) -> None:
    import csv
    import io
    import json
    import sys

    from pear_data.stages.statistics_text import csv_cell, flat_rows
    from pear_data.stages.text import printable

    if form == "json":
        # ASCII: a source may hold characters that steer a terminal.
        click.echo(json.dumps([one.model_dump(mode="json") for one in found], indent=1))
        return
    rows = flat_rows(found, by)
    if form == "jsonl":
        for row in rows:
            click.echo(json.dumps(row))
    elif rows:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([csv_cell(value) for value in row.values()] for row in rows)
        shown = printable(text.getvalue()) if sys.stdout.isatty() else text.getvalue()
        click.echo(shown, nl=False)
