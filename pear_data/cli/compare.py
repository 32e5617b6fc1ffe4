"""`pear-data compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pear_data.cli.options import common_options

if TYPE_CHECKING:
    from pear_data.stages.compare import Comparison


@click.command("compare", short_help="Put weightings side by side: rank correlation, where they disagree.")
@click.argument("names", nargs=-1, metavar="NAME NAME...")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="K",
    help="How many samples, and how many tokens, to name where two weightings disagree most.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    envvar="PEAR_COMPARE_FORMAT",
    default="table",
    show_default=True,
    help="json: everything, nested.",
)
@common_options
def command(store: Path, names: tuple[str, ...], samples: int, form: str) -> None:
    """Put two weightings or more side by side: the table of `stats`, how far they rank tokens and samples alike, and
    the samples and tokens they disagree on most.

    Disagreement is the ratio of two weights over their usual ratio, which is its geometric mean in the corpus: a
    weighting that is another one times a constant disagrees with it nowhere.

    \b
    Examples:
      pear-data compare block sequence
      pear-data compare block lines dft --samples 10
      pear-data compare block uniform --format json | jq '.pairs[0].samples'
    """
    from pear_data.stages.compare import compare
    from pear_data.store import open_store

    found = compare(open_store(store), names, disagreements=samples)
    if form == "table":
        _print_tables(found)
    else:
        # ASCII: a sample may hold characters that steer a terminal.
        click.echo(found.model_dump_json(indent=1, ensure_ascii=True))


def _print_tables(found: Comparison) -> None:
    import sys

    from rich.console import Console

    from pear_data.stages.compare_text import comparison_tables
    from pear_data.stages.sql import UNLIMITED_WIDTH

    width = None if sys.stdout.isatty() else UNLIMITED_WIDTH
    console = Console(markup=False, highlight=False, emoji=False, width=width)
    for shown in comparison_tables(found):
        console.print(shown, soft_wrap=isinstance(shown, str))
