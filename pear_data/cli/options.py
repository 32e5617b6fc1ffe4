"""Options shared by commands, made from the settings models so that help, defaults and recipes cannot differ."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pear_data.config import first_fault
from pear_data.errors import EXIT_OK, EXIT_QUARANTINED, UsageError
from pear_data.progress import Outcome
from pear_data.redaction import redacted
from pear_data.stages.text import printable

Command = TypeVar("Command", bound=Callable[..., Any])
Model = TypeVar("Model", bound=BaseModel)


def common_options(function: Command) -> Command:
    """`--store` and `--debug`, which every command takes."""
    store = click.option(
        "--store",
        envvar="PEAR_STORE",
        type=click.Path(path_type=Path),
        default=Path("pear_store"),
        show_default="./pear_store",
        help="Folder of the store (environment: PEAR_STORE).",
    )
    return debug_option(store(function))


def debug_option(function: Command) -> Command:
    """`--debug` on a command, where people append it to a command that has just failed."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Traceback on errors.")(function)


def settings_options(model: type[BaseModel], *names: str) -> Callable[[Command], Command]:
    """One click option for each named field of a settings model (all of them when none is named)."""

    def decorate(function: Command) -> Command:
        for name in reversed(names or tuple(model.model_fields)):
            function = _option(name, model.model_fields[name])(function)
        return function

    return decorate


def build(model: type[Model], values: dict[str, Any]) -> Model:
    """Validate `values` as `model`; the first fault becomes a one-line UsageError naming the option."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        place, message = first_fault(error)
        inside = ".".join(place[1:])
        where = f"--{place[0].replace('_', '-')}: " if place else ""
        where += f"{inside}: " if inside and not inside.isdecimal() else ""
        raise UsageError(where + message) from None


def finish(*outcomes: Outcome) -> int:
    """Print what was done and return the exit code: 3 where rows were set aside, else 0."""
    for outcome in outcomes:
        click.echo(printable(redacted(outcome.summary)), err=True)
    return EXIT_QUARANTINED if any(outcome.rejected for outcome in outcomes) else EXIT_OK


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    flag = "--" + name.replace("_", "-")
    default = None if field.is_required() else field.default
    common: dict[str, Any] = {
        "default": default,
        "help": field.description,
        "show_default": default is not None,
    }
    kind = _without_none(field.annotation)
    if kind is bool:
        return click.option(flag, is_flag=True, **common)
    if get_args(kind) == (str, ...):
        return click.option(flag, multiple=True, metavar="KEY=VALUE", help=field.description)
    if get_origin(kind) is dict:
        return click.option(
            flag,
            type=click.Path(exists=True, dir_okay=False),
            metavar="FILE",
            callback=_mapping,
            help=_in_file(field),
        )
    if get_origin(kind) is tuple:
        return click.option(flag, nargs=2, type=float, metavar="LOW HIGH", **common)
    if get_origin(kind) is Literal:
        return click.option(flag, type=click.Choice(get_args(kind)), **common)
    return click.option(flag, type=kind if kind in (int, float) else str, **common)


def _in_file(field: FieldInfo) -> str:
    return f"{field.description} A YAML file; in a recipe the mapping itself."


def _mapping(context: click.Context, parameter: click.Parameter, path: str | None) -> Any:
    """What a YAML file of settings holds; the settings model checks it."""
    if path is None:
        return {}
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation
