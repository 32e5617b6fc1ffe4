"""Trainers whose requirements are not ours: their packages in a folder, in front of this environment's.

Only what differs is installed, with `--no-deps` and by exact version, so torch and the rest are those of the tests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OwnEnvironment:
    """Runs Python with the packages of `packages` in front; what a trainer caches goes to `caches`."""

    packages: Path
    caches: Path

    def python(self, *arguments: str, cwd: Path, timeout: float = 300, **variables: str) -> str:
        """The output of `python ARGUMENTS`; AssertionError with its end when it fails. Its children die with it."""
        log = cwd / f"output-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=cwd,
                env=self._variables() | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | str = child.wait(timeout)
            except subprocess.TimeoutExpired:
                status = f"no end after {timeout:g} s"
            finally:
                _end_session(child)
        text = log.read_text(errors="replace")
        assert status == 0, f"{' '.join(arguments)}: {status}\n{text[-6000:]}"
        return text

    def _variables(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": str(self.packages),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.caches / "huggingface"),
            "MODELSCOPE_CACHE": str(self.caches / "modelscope"),
            "XDG_CACHE_HOME": str(self.caches),
        }


Environments = Callable[[str, Sequence[str]], OwnEnvironment]


def install(folder: Path, requirements: Sequence[str]) -> OwnEnvironment:
    """Install `requirements` into `folder`."""
    packages = folder / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return OwnEnvironment(packages, folder / "caches")


def _end_session(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        child.wait()
