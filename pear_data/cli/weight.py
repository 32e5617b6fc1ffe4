"""`pear-data weight`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pear_data.cli.options import build, common_options, finish, settings_options
from pear_data.config import WeightSettings


@click.command("weight", short_help="Compute importance weights from the two policies' log-probs.")
@settings_options(WeightSettings)
@click.option("--overwrite", is_flag=True, help="Replace a weighting of this name made with other settings.")
@common_options
def command(store: Path, overwrite: bool, **options: Any) -> int:
    """Compute importance weights and store them beside the corpus, one file per shard.

    Several weightings live side by side, each under its own --name.

    \b
    Examples:
      pear-data weight
      pear-data weight --level token --gamma 0.99 --name token-g99
      pear-data weight --level sequence --clip-log-weight -5 2
    """
    from pear_data.cli.terminal import TerminalProgress
    from pear_data.stages.weight import weight
    from pear_data.store import writable_store

    settings = build(WeightSettings, options)
    with writable_store(store) as opened:
        return finish(weight(opened, settings, TerminalProgress(), overwrite=overwrite))
