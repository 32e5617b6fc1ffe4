"""`pear-data weight`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from pear_data.cli.options import build, common_options, finish, settings_options
from pear_data.config import WeightLevel, WeightSettings
from pear_data.errors import UsageError

_OTHERS = tuple(name for name in WeightSettings.model_fields if name != "level")
_OF_BLOCKS = ("block_by", "block_regex")


@click.command("weight", short_help="Compute importance weights from the two policies' log-probs.")
@click.option(
    "--level",
    "levels",
    type=click.Choice(get_args(WeightLevel)),
    multiple=True,
    envvar="PEAR_WEIGHT_LEVEL",
    default=[WeightSettings.model_fields["level"].default],
    show_default=True,
    help=f"{WeightSettings.model_fields['level'].description} Given again: several weightings in one pass.",
)
@settings_options(WeightSettings, *_OTHERS)
@click.option("--overwrite", is_flag=True, help="Replace a weighting of this name made with other settings.")
@common_options
def command(store: Path, levels: tuple[str, ...], overwrite: bool, **options: Any) -> int:
    """Compute importance weights and store them beside the corpus, one file per shard.

    Several weightings live side by side, each under its own --name.

    \b
    Examples:
      pear-data weight
      pear-data weight --level token --level block --level sequence
      pear-data weight --level token --gamma 0.99 --name token-g99
      pear-data weight --block-by sentences --normalize corpus --name steps
      pear-data weight --level sequence --clip-log-weight -5 2
    """
    from pear_data.cli.terminal import TerminalProgress
    from pear_data.stages.weight import weight_all
    from pear_data.store import writable_store

    weightings = [build(WeightSettings, _of_level(level, levels, options)) for level in dict.fromkeys(levels)]
    if len(weightings) > 1 and options["name"]:
        raise UsageError("--name: several levels cannot share a name; each is stored under its own")
    with writable_store(store) as opened:
        return finish(*weight_all(opened, weightings, TerminalProgress(), overwrite=overwrite))


def _of_level(level: str, levels: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The options of one level; among several, what only blocks have is for the block level alone."""
    if level != "block" and "block" in levels:
        options = {name: value for name, value in options.items() if name not in _OF_BLOCKS}
    return {**options, "level": level}
