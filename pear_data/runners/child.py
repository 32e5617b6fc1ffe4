"""The child process of `LocalHost`: `python -m pear_data.runners.child DESCRIPTOR`.

It talks over the inherited socket: first comes what opens the engine, back goes what `ServedEngine.open` says; then
batches come, and back go counts of tokens and, last, log-probs or a `Trouble`. None means: close.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from pear_data.runners.leaving import leave_signals_to_parent
from pear_data.runners.served import ServedEngine

Requests = queue.SimpleQueue[Any]


def serve(descriptor: int) -> None:
    """Serve one engine over the socket until it is closed."""
    leave_signals_to_parent()
    os.set_inheritable(descriptor, False)  # a child of the engine's must not hold it open
    parent = Connection(descriptor)
    requests: Requests = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(parent, requests), daemon=True).start()
    engine = ServedEngine(requests.get())
    parent.send(engine.open())
    while (batch := requests.get()) is not None:
        parent.send(engine.score(batch, parent.send))
    engine.close()


def _receive(parent: Connection, requests: Requests) -> None:
    """Take in what the parent sends; when it is gone, so is this process, and every process of its group."""
    try:
        while True:
            requests.put(parent.recv())
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
