"""Scores batches with VllmEngine in a process of its own: vLLM must find its environment set before it is imported.

    python vllm_child.py targets JOB.json      the V2 model runner on a CPU, through Triton's interpreter
    python vllm_child.py classic JOB.json      vLLM as a user on a CPU meets it
    python vllm_child.py spawned JOB.json      the same with the engine in a process of its own, as on a GPU

JOB.json is a list of {"model": directory, "batch": .npz of a TokenBatch, "result": .npz to write}. The result holds
`logprobs`, `again` (the last samples' log-probs in a second call, when vLLM's prefix cache knows them) and the
engine's `identity` as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def use_v2_runner_on_cpu() -> None:
    """Let vLLM's V2 runner, whose kernels are Triton's, run where Triton has no compiler: interpreted."""
    os.environ |= {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    import torch
    from triton.backends import backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

        @staticmethod
        def get_current_target() -> None:
            return None

        @staticmethod
        def get_active_torch_device() -> torch.device:
            return torch.device("cpu")

    backends["cpu"] = SimpleNamespace(driver=Driver, compiler=None)


def run(job: dict[str, Any], path: str) -> None:
    from pear_data.engines.vllm_engine import VllmEngine
    from pear_data.tokens import TokenBatch

    stored = np.load(job["batch"])
    batch = TokenBatch(
        stored["sample_ids"].tolist(), stored["input_ids"], stored["loss_mask"], stored["offsets"]
    )
    engine = VllmEngine(job["model"], path=path)
    done: list[int] = []
    logprobs = engine.score(batch, done.append)
    assert sum(done) == len(batch.input_ids)
    last = batch.take(range(len(batch) - 3, len(batch)))
    again = engine.score(last, done.append)
    np.savez(job["result"], logprobs=logprobs, again=again, identity=json.dumps(engine.identity()))
    engine.close()


if __name__ == "__main__":
    mode = sys.argv[1]
    if mode == "targets":
        use_v2_runner_on_cpu()
        from pear_data.engines.vllm_paths import Targets

        Targets.max_num_batched_tokens = 256  # so that long samples are prefilled in chunks
    if mode == "spawned":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    for each in json.loads(Path(sys.argv[2]).read_text()):
        run(each, "targets" if mode == "targets" else "auto")
