"""What the training hook exports, and what importing it costs a trainer's environment."""

from __future__ import annotations

import subprocess
import sys

import pear_data.loss


def test_exports() -> None:
    assert sorted(pear_data.loss.__all__) == [
        "LivePear",
        "LiveWeightsOfRows",
        "PearCollator",
        "attach",
        "causal_loss",
        "denominator",
        "linear_logprobs",
        "linear_weighted_nll",
        "live_weights",
        "weighted_nll",
    ]
    assert all(callable(getattr(pear_data.loss, name)) for name in pear_data.loss.__all__)


def test_it_imports_torch_and_nothing_else_of_ours() -> None:
    listing = "import sys, pear_data.loss; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {name for name in modules if name.startswith("pear_data.")}
    assert all(name.startswith("pear_data.loss") for name in ours)
    assert not {"transformers", "polars", "duckdb", "pyarrow", "vllm", "ray"} & set(modules)
