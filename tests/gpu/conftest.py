"""Tests that need a CUDA device: `pytest -m gpu tests/gpu`. Where there is none they are not collected at all."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

for folder in ("reference", "unit/loss", "benchmarks"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
