"""`pear-data run`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pear_data.cli.options import debug_option
from pear_data.errors import EXIT_OK, EXIT_QUARANTINED, UsageError


@click.command("run", short_help="Run a recipe: a YAML file of steps.")
@click.argument("recipe")
@click.option("--store", envvar="PEAR_STORE", help="Folder of the store; wins over the recipe's.")
@click.option("--set", "overrides", multiple=True, metavar="STEP.SETTING=VALUE", help="Change a setting.")
@debug_option
def command(recipe: str, store: str | None, overrides: tuple[str, ...]) -> int:
    """Run RECIPE, a file or the name of a bundled one. Steps done before are found done, so a run resumes.

    A flag wins over the environment (PEAR_WEIGHT_GAMMA=0.99), which wins over the recipe.

    \b
    Examples:
      pear-data run pipelines/demo.yaml
      pear-data run mine.yaml --store /scratch/run7 --set weight.gamma=0.99
    """
    from pear_data.cli.terminal import TerminalProgress
    from pear_data.recipe import load_recipe, run_recipe

    loaded = load_recipe(recipe, os.environ, dict(_split(text) for text in overrides))
    outcomes = run_recipe(loaded, Path(store or loaded.store), TerminalProgress())
    return EXIT_QUARANTINED if any(outcome.rejected for outcome in outcomes) else EXIT_OK


def _split(text: str) -> tuple[str, object]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: write STEP.SETTING=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: the value is not valid YAML: {error}") from None
