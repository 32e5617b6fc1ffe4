"""A process that has loaded everything and forks one for each job asked of it, so that a job starts at once.

Lines of JSON come in: {"folder", "steps" (all but the model's), "limits" (of `resource`, by name), "shard_tokens",
"kill_after" (seconds)}. For each one goes out when the process has ended: {"status", "message", "peak_rss", "peak_as"}.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import small_job

from pear_data.errors import PearError


class Zygote:
    """Runs jobs in processes of their own; a context manager."""

    def __enter__(self) -> Zygote:
        environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def run(self, folder: Path, steps: list[str] | None = None, **request: Any) -> dict[str, Any]:
        """Do a job; how it ended."""
        line = json.dumps({"folder": str(folder), "steps": steps, **request})
        print(line, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _job(request: dict[str, Any]) -> dict[str, Any]:
    for name, limit in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    small_job.SHARD_TOKENS = request.get("shard_tokens", small_job.SHARD_TOKENS)
    try:
        for step in request["steps"] or small_job.WITHOUT_A_MODEL:
            small_job.STEPS[step](Path(request["folder"]))
    except PearError as error:
        answer = {"status": error.exit_code, "message": str(error)}
    except BaseException as error:
        answer = {"status": -1, "message": repr(error)}
    else:
        answer = {"status": 0, "message": ""}
    kilobytes = re.search(r"VmPeak:\s*(\d+) kB", Path("/proc/self/status").read_text())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**answer, "peak_rss": peak << 10, "peak_as": int(kilobytes[1]) << 10}


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            with contextlib.suppress(BaseException):
                os.write(writing, json.dumps(_job(request)).encode())
            os._exit(0)
        os.close(writing)
        if not select.select([reading], [], [], request.get("kill_after"))[0]:
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(reading) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(pid, 0)
        print(answer or json.dumps({"status": -os.WTERMSIG(status), "message": "killed"}), flush=True)


if __name__ == "__main__":
    _serve()
