"""`pear-data migrate`."""

from __future__ import annotations

from pathlib import Path

import click

from pear_data.cli.options import common_options, finish


@click.command("migrate", short_help="Bring an older store to this version's format.")
@common_options
def command(store: Path) -> int:
    """Bring a store that an earlier pear-data wrote to the present format version, in place.

    Nothing is scored again: weights are made from the stored log-probs, with the settings they had. Killed at any
    moment it leaves the old store or the new one; give it again and it goes on.

    \b
    Examples:
      pear-data migrate
      pear-data migrate --store /scratch/run7
    """
    from pear_data.cli.terminal import TerminalProgress
    from pear_data.stages.migrate import migrate

    return finish(migrate(store, TerminalProgress()))
