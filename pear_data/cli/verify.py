"""`pear-data verify`."""

from __future__ import annotations

from pathlib import Path

import click

from pear_data.cli.options import common_options, finish


@click.command("verify", short_help="Check every artefact against its manifest.")
@common_options
def command(store: Path) -> int:
    """Check checksums, schemas and row alignment of every artefact in the store.

    \b
    Examples:
      pear-data verify
      pear-data verify --store /scratch/run7
    """
    from pear_data.cli.terminal import TerminalProgress
    from pear_data.stages.verify import verify
    from pear_data.store import open_store

    return finish(verify(open_store(store), TerminalProgress()))
