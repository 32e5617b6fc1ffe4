"""`pear-data export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pear_data.cli.options import build, common_options, finish, settings_options
from pear_data.config import ExportSettings


@click.command("export", short_help="Write a weighted dataset for a trainer.")
@click.argument("out")
@settings_options(ExportSettings, "weights", "format")
@common_options
def command(store: Path, out: str, **options: Any) -> int:
    """Write the corpus with its weights to OUT, a new directory.

    `hf` is Parquet with input_ids, attention_mask, labels and loss_weights; train on it with
    pear_data.loss.attach(model) and PearCollator.

    \b
    Examples:
      pear-data export out/
      pear-data export out-token/ --weights token --format hf
    """
    from pear_data.cli.terminal import TerminalProgress
    from pear_data.stages.export import export
    from pear_data.store import open_store

    settings = build(ExportSettings, {"out": out, **options})
    return finish(export(open_store(store), settings, TerminalProgress()))
