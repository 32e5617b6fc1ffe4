"""`pear-data report`."""

from __future__ import annotations

from pathlib import Path

import click

from pear_data.cli.options import build, common_options, finish
from pear_data.config import ReportSettings


@click.command("report", short_help="Write one HTML page: numbers, charts, coloured tokens.")
@click.option("-o", "--output", "out", required=True, metavar="FILE", help="HTML file to write.")
@click.option("--weights", metavar="NAME", help="Weighting to show; default: all.")
@common_options
def command(store: Path, out: str, weights: str | None) -> int:
    """Write one self-contained HTML page for people who did not run the job; it needs no network and no script.

    \b
    Examples:
      pear-data report -o report.html
      pear-data report -o block.html --weights block
    """
    from pear_data.stages.report import report
    from pear_data.store import open_store

    settings = build(ReportSettings, {"out": out, "weights": weights})
    return finish(report(open_store(store), settings))
