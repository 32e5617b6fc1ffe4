"""No test may reach a hub: whatever is not on this machine must fail at once, not after a time-out."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the tests side by side have the cores, not each the threads of all
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# `pytest --hypothesis-profile=long tests/property` tries twenty times as much.
settings.register_profile("long", max_examples=2000)
