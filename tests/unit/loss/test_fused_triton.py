"""The CUDA epilogue where there is no CUDA: Triton's interpreter runs the very kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_kernel_does_what_torch_does() -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("epilogues_compared.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal\n", done.stderr
