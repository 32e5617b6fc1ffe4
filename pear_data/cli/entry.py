"""The `pear-data` group and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import click

from pear_data import __version__
from pear_data.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, PearError
from pear_data.stages.text import one_line

COMMANDS = (
    "demo",
    "ingest",
    "score",
    "weight",
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


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 error, 2 usage, 3 rows quarantined, 4 mismatch, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    # Read when torch is loaded. Threads that wait by spinning starve each other where another process has a core:
    # scoring on 2 cores was seen to fall from 29,000 to 1,700 tokens/s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors are one line on stderr."""
    try:
        result = pear_data.main(arguments, prog_name="pear-data", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "pear-data"
        return _fail(f"{error.format_message()} (see `{command} --help`)", EXIT_USAGE)
    except click.ClickException as error:
        return _fail(error.format_message(), EXIT_ERROR)
    except (KeyboardInterrupt, click.Abort):
        resume = shlex.join(["pear-data", *arguments])
        return _fail(f"interrupted; finished shards are kept. Resume with: {resume}", EXIT_INTERRUPTED)
    except SystemExit:
        # click exits so when the reader of our output (`| head`) has had enough; nothing is left to tell it.
        return EXIT_OK
    except PearError as error:
        return _fail(str(error), error.exit_code, debug="--debug" in arguments)
    except (OSError, MemoryError) as error:
        return _fail(_refusal(error), EXIT_ERROR, debug="--debug" in arguments)
    except Exception as error:
        reason = (str(error) or "no message").splitlines()[0]
        where = (
            f"unexpected {type(error).__name__}: {reason}; run it again with --debug and report the traceback"
        )
        return _fail(where, EXIT_ERROR, debug="--debug" in arguments)
    return result if isinstance(result, int) else EXIT_OK


def _refusal(error: OSError | MemoryError) -> str:
    """What the system would not give, which no traceback tells better."""
    if isinstance(error, MemoryError):
        return "out of memory: give the process more, or fewer --workers; finished shards are kept"
    where = f"{error.filename}: " if error.filename is not None else ""
    reason = (error.strerror or str(error) or type(error).__name__).splitlines()[0]
    return f"the system refused ({where}{reason}): mend that and run the same command again"


def _fail(message: str, code: int, *, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    # A message may quote a corpus, a file's name or a library.
    click.echo(f"Error: {one_line(' '.join(message.split()))}", err=True)
    return code


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
