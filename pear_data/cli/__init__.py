"""The command line: `pear-data COMMAND`. One file per command, imported when it is asked for."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from pear_data.cli.interrupts import ignore_signals, take_signals
from pear_data.errors import EXIT_INTERRUPTED

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 error, 2 usage, 3 rows quarantined, 4 mismatch, 130 interrupted."""
    take_signals()  # before anything that takes its time to import
    # Read when torch is loaded. Threads that wait by spinning starve each other where another process has a core:
    # scoring on 2 cores was seen to fall from 29,000 to 1,700 tokens/s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from pear_data.cli.entry import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # outside of any command
        code = EXIT_INTERRUPTED
    ignore_signals()
    sys.exit(code)
