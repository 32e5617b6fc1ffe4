"""The command line: `pear-data COMMAND`. One file per command, imported when it is asked for."""

from __future__ import annotations

from pear_data.cli.entry import main

__all__ = ["main"]
