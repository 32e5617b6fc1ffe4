"""How the processes that work for a command take signals: the command decides, and they end with it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

# Time for the parent to end a process itself, where a signal went to all processes of a job.
GRACE_SECONDS = 3.0


def leave_signals_to_parent() -> None:
    """Let Ctrl-C pass, and end a while after SIGTERM or SIGHUP; work under way goes on until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave_later)


def _leave_later(signum: int, frame: FrameType | None) -> None:
    timer = threading.Timer(GRACE_SECONDS, os._exit, [128 + signum])
    timer.daemon = True
    timer.start()
