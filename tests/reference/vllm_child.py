"""Scores batches with VllmEngine in a process of its own: vLLM must find its environment set before it is imported.

    python vllm_child.py targets JOBS.json      the V2 model runner on a CPU, through Triton's interpreter
    python vllm_child.py classic JOBS.json      vLLM as a user on a CPU meets it
    python vllm_child.py spawned JOBS.json      the same with the engine in a process of its own, as on a GPU

JOBS.json is a list of {"model": directory, "options": of the engine, "batches": {name: .npz of a TokenBatch},
"result": .npz to write}. The result holds each batch's log-probs under its name, `again` (the last samples of the
last batch in a second call, when vLLM's prefix cache knows them), `cached` (tokens each of the requests found in the
cache, in order), `steps` (how often progress was told) and the engine's `identity` as JSON; or, where the engine does
not start, the reason as `error`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
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
    from pear_data.errors import PearError
    from pear_data.tokens import TokenBatch

    try:
        engine = VllmEngine(job["model"], path=path, **job["options"])
    except PearError as error:
        np.savez(job["result"], error=str(error))
        return
    cached: list[int] = []
    _watch(engine, cached)
    found: dict[str, Any] = {}
    for name, file in job["batches"].items():
        stored = np.load(file)
        batch = TokenBatch(
            stored["sample_ids"].tolist(), stored["input_ids"], stored["loss_mask"], stored["offsets"]
        )
        done: list[int] = []
        found[name] = engine.score(batch, done.append)
        assert sum(done) == len(batch.input_ids)
        found |= {f"{name}-cached": cached.copy(), f"{name}-steps": len(done)}
        cached.clear()
    last = batch.take(range(len(batch) - 3, len(batch)))
    found["again"] = engine.score(last, done.append)
    np.savez(job["result"], **found, identity=json.dumps(engine.identity()))
    engine.close()


def _watch(engine: Any, cached: list[int]) -> None:
    """Note what vLLM says it found in its prefix cache for each request."""
    generate = engine._process.generate

    def watched(prompts: Any, parameters: Any) -> Iterator[tuple[int, Any]]:
        for index, output in generate(prompts, parameters):
            cached.append(output.num_cached_tokens)
            yield index, output

    engine._process.generate = watched


if __name__ == "__main__":
    mode = sys.argv[1]
    if mode == "targets":
        use_v2_runner_on_cpu()
    if mode == "spawned":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    for each in json.loads(Path(sys.argv[2]).read_text()):
        run(each, "targets" if mode == "targets" else "auto")
