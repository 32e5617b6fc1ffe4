"""Ctrl-C, SIGTERM and SIGHUP all interrupt a command once, and cannot interrupt what it does to end cleanly."""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What a command needs at most to end; a signal after that is a new one, in case something swallowed the first.
ENDING_SECONDS = 10.0
_IMPORTING = "ExtensionFileLoader."
_RETRY_SECONDS = 0.05

_last: float | None = None


def take_signals() -> None:
    """Make every signal a KeyboardInterrupt, but those that this process was started to ignore (nohup)."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)


def ignore_signals() -> None:
    """For the last moments: there is nothing left to interrupt."""
    for number in (*SIGNALS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def was_interrupted() -> bool:
    """Whether a signal came: an error after that is how something noticed."""
    return _last is not None


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _last
    now = time.monotonic()
    if _last is not None and now - _last < ENDING_SECONDS:
        return
    if _imports(frame):
        # A library written in C++ may abort the process where an exception meets it while it is imported: later, then.
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
        return
    _last = now
    raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_qualname.startswith(_IMPORTING):
            return True
        frame = frame.f_back
    return False
