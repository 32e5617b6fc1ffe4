"""Rows for standard output or a file, in the format asked for or that fits: `sql` and `quarantine list`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

import click

from pear_data.cli.options import Command
from pear_data.errors import UsageError

if TYPE_CHECKING:
    from pear_data.stages.sql import Format

FORMATS = ("table", "json", "jsonl", "csv", "parquet")
Note = TypeVar("Note")


def rows_options(variable: str) -> Callable[[Command], Command]:
    """`--format`, which the environment `variable` gives too, as `chosen`, and `--output`."""
    chosen = click.option(
        "--format",
        "chosen",
        type=click.Choice(FORMATS),
        envvar=variable,
        help="Default: what --output's name ends in, else a table on a terminal and JSON lines in a pipe.",
    )
    output = click.option(
        "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write."
    )
    return lambda function: chosen(output(function))


def write_out(chosen: str | None, output: Path | None, write: Callable[[Format, BinaryIO], Note]) -> Note:
    """Have `write` write its rows where they go; nothing in them steers a terminal."""
    from pear_data.cli.terminal import PrintableSink
    from pear_data.store.commit import atomic_path, operation

    stdout = sys.stdout.buffer
    form = cast("Format", chosen or _default_format(output, stdout.isatty()))
    if output is not None:
        with atomic_path(output) as temporary, operation("write", output), temporary.open("wb") as file:
            return write(form, file)
    if form == "parquet" and stdout.isatty():
        raise UsageError("Parquet is not for a terminal: give -o FILE")
    raw = stdout.isatty() and form != "table"
    note = write(form, cast("BinaryIO", PrintableSink(stdout)) if raw else stdout)
    stdout.flush()
    return note


def _default_format(output: Path | None, terminal: bool) -> str:
    if output is None:
        return "table" if terminal else "jsonl"
    suffix = output.suffix.removeprefix(".")
    return suffix if suffix in FORMATS else "jsonl"
