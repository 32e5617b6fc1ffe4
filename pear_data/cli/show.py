"""`pear-data show`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pear_data.cli.options import common_options


@click.command("show", short_help="Show one sample, its tokens coloured by weight.")
@click.argument("sample_id")
@click.option("--weights", metavar="NAME", help='Weighting; default: "block", else the first made.')
@click.option(
    "--table", is_flag=True, help="A row per scored token: its log-ratio and every weighting's weight."
)
@common_options
def command(store: Path, sample_id: str, weights: str | None, table: bool) -> None:
    """Show one sample, its scored tokens coloured by weight: blue below 1, orange above; the prompt is dim.

    \b
    Examples:
      pear-data show 5f3c9d02
      pear-data show 5f3c9d02 --weights token --table
      pear-data show "$(pear-data sql --format csv 'select sample_id from samples order by ess limit 1' | tail -1)"
    """
    from rich.console import Console

    from pear_data.stages.show import show
    from pear_data.stages.sql import UNLIMITED_WIDTH
    from pear_data.store import open_store

    width = None if sys.stdout.isatty() else UNLIMITED_WIDTH
    console = Console(markup=False, highlight=False, emoji=False, width=width)
    show(open_store(store), sample_id, weights, console, table=table)
