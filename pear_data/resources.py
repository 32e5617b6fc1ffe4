"""What is bundled: the recipes in `pipelines/`, the contracts in `schemas/`, the demo's corpus and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from pear_data.errors import UsageError

BUNDLED = "bundled:"


def folder(name: str) -> Path:
    """The bundled folder `pipelines` or `schemas`: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def resolve(reference: str) -> str:
    """A file or model reference, with `bundled:corpus`, `bundled:initial`, `bundled:behavior` made into paths.

    Raises:
        UsageError: nothing of that name is bundled.
    """
    if not reference.startswith(BUNDLED):
        return reference
    from pear_data.demo import asset

    name = reference.removeprefix(BUNDLED)
    try:
        return str(asset(cast("Any", name)))
    except KeyError:
        raise UsageError(f"nothing is bundled as {name!r}: there are corpus, initial and behavior") from None


def recipe_path(reference: str) -> Path:
    """A recipe: the file itself, or the bundled one of that name (`pipelines/demo.yaml`, `demo.yaml`, `demo`).

    Raises:
        UsageError: there is neither.
    """
    path = Path(reference)
    if path.is_file():
        return path
    bundled = folder("pipelines")
    for name in (path.name, f"{path.name}.yaml"):
        if (bundled / name).is_file():
            return bundled / name
    names = ", ".join(sorted(entry.name for entry in bundled.glob("*.yaml")))
    raise UsageError(f"no recipe {reference}: give a YAML file, or one of the bundled {names}")
