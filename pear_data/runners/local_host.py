"""An engine in a child process, in a session of its own: it can be killed whole, and does not outlive its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from pear_data.engines.base import OnTokens
from pear_data.engines.vllm_process import output_is_wanted
from pear_data.redaction import redacted
from pear_data.runners.base import EngineLostError, Facts, Floats, OpenEngine
from pear_data.runners.served import Trouble
from pear_data.tokens import TokenBatch

CLOSING_SECONDS = 10.0
_LAST_WORDS = 2000  # bytes


class LocalHost:
    """A `Host` whose child starts at once; nothing waits for it before `ready`.

    Args:
        open_engine: called in the child, which finds modules where this process does.
        environment: variables of the child, besides those of this process.
    """

    def __init__(self, open_engine: OpenEngine, environment: Mapping[str, str]) -> None:
        with contextlib.ExitStack() as undo:
            # An unnamed file: what an engine writes must not mingle with the progress on the terminal.
            self._log = undo.enter_context(tempfile.TemporaryFile())
            output = sys.__stderr__ if output_is_wanted() else self._log
            ours, theirs = socket.socketpair()
            self._connection = undo.enter_context(Connection(ours.detach()))
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "pear_data.runners.child", str(theirs.fileno())],
                    env=os.environ | {"PYTHONPATH": _module_path()} | dict(environment),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            self._held = undo.pop_all()
        self._loaded = self._stopped = False
        self._at_work = threading.Lock()  # held while an answer of the child is awaited
        self._stopping = threading.Lock()
        self._send(open_engine)

    def ready(self) -> Facts:
        """See `Host.ready`."""
        with self._at_work:
            answer = self._answer(lambda count: None)
        if isinstance(answer, Trouble):
            answer.raise_at_start()
        self._loaded = True
        facts: Facts = answer
        return facts

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> Floats:
        """See `Host.score`."""
        with self._at_work:
            self._send(batch)
            answer = self._answer(on_tokens)
        if isinstance(answer, Trouble):
            answer.raise_at_work()
        logprobs: Floats = answer
        return logprobs

    def stop(self) -> None:
        """See `Host.stop`. An idle engine is asked to close; one that loads or scores is killed."""
        with self._stopping:
            if self._stopped:
                return
            self._stopped = True
            idle = self._loaded and self._at_work.acquire(blocking=False)
            if not (idle and self._closes()):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            if not idle:
                self._at_work.acquire()
            self._held.close()
            self._at_work.release()

    def _closes(self) -> bool:
        """Ask an idle engine to close; whether that went well, so that nothing it started is left."""
        self._send(None)
        try:
            return self._process.wait(CLOSING_SECONDS) == 0
        except subprocess.TimeoutExpired:
            return False

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # a child that is gone is noticed where its answer is awaited
            self._connection.send(message)

    def _answer(self, on_tokens: OnTokens) -> Any:
        try:
            while isinstance(message := self._connection.recv(), int):
                on_tokens(message)
        except (EOFError, OSError):
            raise EngineLostError("it was stopped" if self._stopped else self._end()) from None
        return message

    def _end(self) -> str:
        """How the child ended, without reaping it, and the last line it wrote."""
        try:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:  # reaped in this very moment
            return "it was stopped"
        assert ended is not None  # without WNOHANG
        if ended.si_code == os.CLD_EXITED:
            how = f"its process exited with code {ended.si_status}"
        else:
            how = f"its process was killed by {signal.Signals(ended.si_status).name}"
            if ended.si_status == signal.SIGKILL:
                how += " (was the machine out of memory?)"
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), _LAST_WORDS, max(0, size - _LAST_WORDS))
        lines = tail.decode(errors="replace").split("\n")
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}; its last words: {redacted(words)}" if words else how


def _module_path() -> str:
    """Where this process finds modules. `-P` keeps the child from looking in the current folder besides."""
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path)
