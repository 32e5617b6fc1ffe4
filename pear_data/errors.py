"""What can go wrong, and the exit code each kind ends a command with.

    PearError (1)               anything a user can act on
    |-- StuckError (1, 130)     what was stopped goes on in a library that hears nothing: the process must end
    |-- UsageError (2)          the command was asked for something it cannot do
    |-- MismatchError (4)       an artefact differs from its manifest or from the settings it was made with
    `-- SampleError             one row is unusable: it is quarantined with the reason, the job goes on

A message says what, where and what to do next, in one line.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_QUARANTINED = 3
EXIT_MISMATCH = 4
EXIT_INTERRUPTED = 130


class PearError(Exception):
    """An error with a one-line message for the user; ends a command with `exit_code`."""

    exit_code = EXIT_ERROR


class StuckError(PearError):
    """Work that was stopped goes on in a library's own thread, which no interrupt reaches: the process must end."""

    def __init__(self, message: str, exit_code: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(PearError):
    """The request itself is wrong: an unknown name, options that exclude each other, a missing choice."""

    exit_code = EXIT_USAGE


class MismatchError(PearError):
    """An artefact does not match its manifest, or the settings it was made with."""

    exit_code = EXIT_MISMATCH


class SampleError(PearError):
    """One row cannot become a sample; the message is the reason stored in the quarantine."""
