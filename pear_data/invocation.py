"""The command this process runs, as somebody would give it again: for the log, and for whoever interrupted it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextvars import ContextVar

from pear_data.redaction import redacted

_STORE = "PEAR_STORE"
_STEPS = ("ingest", "score", "weight", "report", "export")
# Commands that keep what they have done, and go on behind it.
RESUMABLE = ("ingest", "score", "weight", "migrate", "quarantine", "run", "demo")

# Where a program calls the stages, there is none.
command: ContextVar[str | None] = ContextVar("command", default=None)


def command_line(
    arguments: Sequence[str], name: str | None, environment: Mapping[str, str] | None = None
) -> str:
    """`pear-data` with `arguments` for a shell, before it the variables that the command `name` reads; no secrets."""
    variables = os.environ if environment is None else environment
    prefixes = tuple(f"PEAR_{each}_".upper() for each in (name or "", *(_STEPS if name == "run" else ())))
    own_store = name == "demo" or any(each.partition("=")[0] == "--store" for each in arguments)
    read = [
        f"{key}={shlex.quote(value)}"
        for key, value in sorted(variables.items())
        if key.startswith(prefixes) or (key == _STORE and not own_store)
    ]
    return redacted(" ".join([*read, shlex.join(["pear-data", *arguments])]))


def how_to_go_on(arguments: Sequence[str], name: str | None) -> str:
    """What an interrupted command left, and the command that goes on."""
    again = command_line(arguments, name)
    if name not in RESUMABLE:
        return f"interrupted; what was finished before is as it was. Give it again with: {again}"
    source = ", with the same standard input," if "-" in arguments else ""
    return f"interrupted; finished shards are kept. Resume{source} with: {again}"
