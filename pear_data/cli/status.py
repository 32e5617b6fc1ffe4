"""`pear-data status`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pear_data.cli.options import common_options

_PIPED_WIDTH = 200


@click.command("status", short_help="What is done, what is left, how fast it goes; also while it runs.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    envvar="PEAR_STATUS_FORMAT",
    help="Default: a table on a terminal, JSON in a pipe.",
)
@common_options
def command(store: Path, form: str | None) -> None:
    """Show each stage's shards done and left, rejected rows, tokens per second and time left.

    Nothing is locked and nothing written: ask as often as you like while another process works. A stage that was
    interrupted, failed or was killed comes with the command that resumes it. What happened in detail is in the store's
    logs/, a line of JSON an event.

    \b
    Examples:
      pear-data status
      watch -n 10 pear-data status --format table
      pear-data status --format json | jq '.stages[] | {stage, state, seconds_left}'
    """
    from pear_data.stages.status import store_status
    from pear_data.store import open_store

    status = store_status(open_store(store))
    if (form or ("table" if sys.stdout.isatty() else "json")) == "json":
        # ASCII: what was said may hold characters that steer a terminal.
        click.echo(status.model_dump_json(indent=1, ensure_ascii=True))
        return
    from rich.console import Console

    from pear_data.stages.status_text import status_lines, status_table

    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    console = Console(markup=False, highlight=False, emoji=False, width=width)
    console.print(status_table(status))
    for line in status_lines(status):
        console.print(line, soft_wrap=True)
