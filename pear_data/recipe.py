"""Recipes: YAML files that name a store and the steps to run on it, in order.

A recipe holds settings, never code. What the environment (`PEAR_<STEP>_<SETTING>`) says wins over the recipe, and
what is given as an override (a flag) wins over both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator

from pear_data.config import (
    ExportSettings,
    IngestSettings,
    ReportSettings,
    ScoreSettings,
    Settings,
    WeightSettings,
    first_fault,
)
from pear_data.errors import UsageError
from pear_data.progress import Outcome, Progress
from pear_data.resources import recipe_path

STEP_SETTINGS: dict[str, type[Settings]] = {
    "ingest": IngestSettings,
    "score": ScoreSettings,
    "weight": WeightSettings,
    "report": ReportSettings,
    "export": ExportSettings,
}


class Step(Settings):
    """One step: exactly one of its fields is given."""

    ingest: IngestSettings | None = None
    score: ScoreSettings | None = None
    weight: WeightSettings | None = None
    report: ReportSettings | None = None
    export: ExportSettings | None = None

    @model_validator(mode="after")
    def _one(self) -> Step:
        given = sorted(self.model_fields_set)
        if len(given) != 1:
            raise ValueError(
                f"a step is one of {', '.join(type(self).model_fields)}; given: {given or 'none'}"
            )
        return self


class Recipe(Settings):
    """A pipeline as `pear-data run` takes it. Paths are relative to the working directory."""

    store: str = Field("pear_store", description="Folder of the store.")
    steps: list[Step] = Field(min_length=1)


def load_recipe(
    reference: str, environment: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe and lay the environment and then `overrides` ("step.setting": value) over every such step.

    Raises:
        UsageError: no such recipe, or the first thing in it that is wrong, with its place.
    """
    path = recipe_path(reference)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        raise UsageError(f"{path}: a recipe is a mapping with a list of steps")
    for step in content["steps"]:
        if isinstance(step, dict):
            _overlay(step, environment or {}, overrides or {})
    _check_overrides_used(content["steps"], overrides or {})
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        place, message = first_fault(error)
        raise UsageError(f"{path}: {'.'.join(place)}: {message}") from None


def run_recipe(recipe: Recipe, store_folder: Path, progress: Progress) -> list[Outcome]:
    """Run every step on one store; a step done before is found done.

    Raises:
        PearError: what the step raises; the steps before it stay done.
    """
    from pear_data.stages.export import export
    from pear_data.stages.ingest import ingest
    from pear_data.stages.report import report
    from pear_data.stages.score import score_policy
    from pear_data.stages.weight import weight
    from pear_data.store import writable_store

    outcomes = []
    with writable_store(store_folder, create=True) as store:
        for step in recipe.steps:
            if step.ingest:
                outcomes.append(ingest(store, step.ingest, progress))
            elif step.score:
                outcomes.append(score_policy(store, step.score, progress))
                if step.score.audit:
                    from pear_data.stages.audit import audit_policy

                    progress.say(outcomes[-1].summary)
                    outcomes.append(audit_policy(store, step.score, progress))
            elif step.weight:
                outcomes.append(weight(store, step.weight, progress))
            elif step.report:
                outcomes.append(report(store, step.report))
            elif step.export:
                outcomes.append(export(store, step.export, progress))
            progress.say(outcomes[-1].summary)
    return outcomes


def _overlay(step: dict[str, Any], environment: Mapping[str, str], overrides: Mapping[str, Any]) -> None:
    for name in step.keys() & STEP_SETTINGS.keys():
        given = step[name]
        if not (given is None or isinstance(given, dict)):
            continue  # refused, with its place, when the recipe is validated
        settings = dict(given or {})
        for setting, field in STEP_SETTINGS[name].model_fields.items():
            text = environment.get(f"PEAR_{name}_{setting}".upper())
            if text is not None:
                settings[setting] = text.split() if get_origin(field.annotation) in (list, tuple) else text
        prefix = f"{name}."
        settings |= {
            key.removeprefix(prefix): value for key, value in overrides.items() if key.startswith(prefix)
        }
        step[name] = settings


def _check_overrides_used(steps: list[Any], overrides: Mapping[str, Any]) -> None:
    present = {name for step in steps if isinstance(step, dict) for name in step}
    for key in overrides:
        name, _, setting = key.partition(".")
        if name not in present or not setting:
            raise UsageError(f"--set {key}: the recipe has no step {name!r}; write STEP.SETTING=VALUE")
