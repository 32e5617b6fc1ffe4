"""The `pear-data` group and the one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback

import click

from pear_data import __version__
from pear_data.cli.interrupts import was_interrupted
from pear_data.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, PearError, StuckError
from pear_data.invocation import command, command_line, how_to_go_on
from pear_data.redaction import redacted
from pear_data.stages.text import one_line

COMMANDS = (
    "demo",
    "ingest",
    "score",
    "weight",
    "status",
    "stats",
    "compare",
    "sql",
    "show",
    "report",
    "export",
    "verify",
    "quarantine",
    "migrate",
    "run",
)


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"pear_data.cli.{cmd_name}").command
        return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "PEAR"},
    epilog="Start with `pear-data demo`. Every command has --help with examples; options can also be given as"
    " PEAR_<COMMAND>_<OPTION> in the environment (the store as PEAR_STORE).",
)
@click.version_option(__version__, prog_name="pear-data")
@click.option("--debug", is_flag=True, help="Show a traceback when something goes wrong.")
@click.pass_context
def pear_data(ctx: click.Context, debug: bool) -> None:
    """Importance weights for SFT data: score two policies, weight every token, look, train anywhere."""
    ctx.obj = debug


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors are one line on stderr."""
    name = next((argument for argument in arguments if argument in COMMANDS), None)
    command.set(command_line(arguments, name))
    try:
        code = _run(arguments)
    except (KeyboardInterrupt, click.Abort):
        code = None
    except StuckError as error:
        _fail(str(error), error.exit_code)
        # Python would wait for the thread for ever.
        os._exit(error.exit_code)
    except Exception as error:
        code = None if was_interrupted() else _failed(error, debug="--debug" in arguments)
    return _fail(how_to_go_on(arguments, name), EXIT_INTERRUPTED) if code is None else code


def _run(arguments: list[str]) -> int:
    try:
        result = pear_data.main(arguments, prog_name="pear-data", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except SystemExit:
        # click exits so when the reader of our output (`| head`) has had enough; nothing is left to tell it.
        return EXIT_OK
    return result if isinstance(result, int) else EXIT_OK


def _failed(error: Exception, *, debug: bool) -> int:
    if isinstance(error, click.UsageError):
        command_path = error.ctx.command_path if error.ctx else "pear-data"
        return _fail(f"{error.format_message()} (see `{command_path} --help`)", EXIT_USAGE)
    if isinstance(error, click.ClickException):
        return _fail(error.format_message(), EXIT_ERROR)
    if debug:
        _echo(redacted(traceback.format_exc().rstrip()))
    if isinstance(error, PearError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, OSError | MemoryError):
        return _fail(_refusal(error), EXIT_ERROR)
    reason = (str(error) or "no message").splitlines()[0]
    unexpected = f"unexpected {type(error).__name__}: {reason}"
    return _fail(f"{unexpected}; run it again with --debug and report the traceback", EXIT_ERROR)


def _refusal(error: OSError | MemoryError) -> str:
    """What the system would not give, which no traceback tells better."""
    if isinstance(error, MemoryError):
        return "out of memory: give the process more, or fewer --workers; finished shards are kept"
    where = f"{error.filename}: " if error.filename is not None else ""
    reason = (error.strerror or str(error) or type(error).__name__).splitlines()[0]
    return f"the system refused ({where}{reason}): mend that and run the same command again"


def _fail(message: str, code: int) -> int:
    # A message may quote a corpus, a file's name or a library.
    _echo(f"Error: {one_line(redacted(' '.join(message.split())))}")
    return code


def _echo(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        click.echo(text, err=True)
