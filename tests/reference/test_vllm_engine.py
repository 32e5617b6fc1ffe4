"""vLLM's log-probs against plain transformers: float32, one sample at a time, float64 log-softmax."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tiny_models import reference_logprobs, save_batch
from vllm_models import groups, save_large_logits, save_quantised

from pear_data.tokens import TokenBatch

Result = dict[str, np.ndarray]
Results = Callable[[str, str], Result]
BOTH = ["corpus", "groups"]
CHUNKED = {"engine_args": {"max_num_batched_tokens": 256}}  # long samples are prefilled in chunks
STARVED = {"engine_args": {"kv_cache_memory_bytes": 2**20}}
# Of each process: a job's model, the engine's options and the batches to score.
JOBS: dict[str, dict[str, tuple[str, dict[str, Any], list[str]]]] = {
    "classic": {
        "qwen2": ("qwen2", {}, BOTH),
        "llama-tied": ("llama-tied", CHUNKED, BOTH),
        "gemma2": ("gemma2", {}, BOTH),
        "bfloat16": ("large-logits", {"dtype": "bfloat16"}, ["groups"]),
        "float32-head": ("large-logits", {"dtype": "bfloat16", "head_dtype": "float32"}, ["groups"]),
        "quantised": ("quantised", {}, ["groups"]),
        "quantised-head": ("quantised", {"head_dtype": "float32"}, []),
        "starved": ("qwen2", STARVED, []),
    },
    "spawned": {"qwen2": ("qwen2", {}, ["corpus"])},
    "targets": {"qwen2": ("qwen2", CHUNKED | {"head_dtype": "float32"}, BOTH)},
}


@pytest.fixture(scope="module")
def models(
    model_dir: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[str, str]]:
    """The directories of a kind of model and of the one with its reference numbers."""
    folder = tmp_path_factory.mktemp("vllm_models")

    @cache
    def directories(kind: str) -> tuple[str, str]:
        if kind == "quantised":
            return save_quantised(folder)
        if kind == "large-logits":
            return (save_large_logits(model_dir("qwen2"), folder / kind),) * 2
        return (model_dir(kind),) * 2

    return directories


@pytest.fixture(scope="module")
def batches(engine_corpus: TokenBatch) -> dict[str, TokenBatch]:
    return {"corpus": engine_corpus, "groups": groups()}


@pytest.fixture(scope="module")
def expected(
    models: Callable[[str], tuple[str, str]], batches: dict[str, TokenBatch]
) -> Callable[[str, str], np.ndarray]:
    """Reference log-probs of a batch under a kind of model, float64."""
    return cache(lambda kind, batch: reference_logprobs(models(kind)[1], batches[batch]))


@pytest.fixture(scope="module")
def results(
    models: Callable[[str], tuple[str, str]],
    batches: dict[str, TokenBatch],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Results]:
    """What `vllm_child.py` found in a mode for a job; all its processes run side by side."""
    folder = tmp_path_factory.mktemp("vllm")
    files = {name: save_batch(folder / f"{name}.npz", batch) for name, batch in batches.items()}
    children = {}
    for mode, jobs in JOBS.items():
        listed = [
            {
                "model": models(kind)[0],
                "options": options,
                "batches": {batch: files[batch] for batch in names},
                "result": str(folder / f"{mode}-{job}.npz"),
            }
            for job, (kind, options, names) in jobs.items()
        ]
        (folder / f"{mode}.json").write_text(json.dumps(listed))
        children[mode] = _start(mode, folder)

    @cache
    def outcome(mode: str) -> None:
        assert children[mode].wait(timeout=500) == 0, (folder / f"{mode}.out").read_text()
        assert (folder / f"{mode}.out").read_text() == "", "vLLM must leave the terminal alone"
        assert not _left_of_session(children[mode].pid)

    def result(mode: str, job: str) -> Result:
        outcome(mode)
        return dict(np.load(folder / f"{mode}-{job}.npz"))

    yield result
    for child in children.values():
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _left_of_session(session: int) -> list[psutil.Process]:
    """Processes of a session whose leader has ended, once those that are ending had 10 seconds for it."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return psutil.wait_procs(left, timeout=10)[1]


def _start(mode: str, folder: Path) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("vllm_child.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    with (folder / f"{mode}.out").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(script), mode, str(folder / f"{mode}.json")],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )


FLOAT32 = [
    (mode, job, kind, batch)
    for mode, jobs in JOBS.items()
    for job, (kind, options, names) in jobs.items()
    for batch in names
    if kind != "quantised" and "dtype" not in options
]


@pytest.mark.parametrize(("mode", "job", "kind", "batch"), FLOAT32)
def test_float32(mode: str, job: str, kind: str, batch: str, results: Results, expected: Any) -> None:
    result = results(mode, job)
    identity = json.loads(str(result["identity"]))
    assert identity["path"] == ("targets" if mode == "targets" else "classic")
    assert (identity["dtype"], identity["quantization"]) == ("float32", None)
    error = np.abs(result[batch] - expected(kind, batch)).max()
    print(f"vllm {mode} {job} {batch}: max error {error:.2e} over {len(result[batch])} tokens")
    assert error <= 1e-3


@pytest.mark.parametrize("mode", ["classic", "targets"])
def test_what_the_prefix_cache_holds_is_scored_again(
    mode: str, results: Results, batches: dict[str, TokenBatch]
) -> None:
    result = results(mode, "qwen2")
    last = int(batches["groups"].num_scored[-3:].sum())
    np.testing.assert_allclose(result["again"], result["groups"][-last:], atol=1e-4)


def test_responses_to_one_prompt_find_it_in_the_cache(results: Results) -> None:
    """Of six samples in a group five differ; the first runs the prompt, the others find its blocks of 128 tokens.

    Two of them differ from the first in their last token alone and need no request.
    """
    result = results("targets", "qwen2")
    assert sorted(result["groups-cached"]) == [0] * 3 + [128] * 4 + [256] * 6
    assert result["groups-steps"] == 1 + 13, "progress moves with every request"
    assert json.loads(str(result["identity"]))["engine_arg.max_num_batched_tokens"] == 256


def test_classic_runs_each_sample_once_and_whole(results: Results) -> None:
    assert results("classic", "qwen2")["groups-cached"].tolist() == [0] * 15


def test_a_float32_head_is_nearer_to_float32(results: Results, expected: Any) -> None:
    error = {
        job: np.abs(results("classic", job)["groups"] - expected("large-logits", "groups"))
        for job in ("bfloat16", "float32-head")
    }
    for job, values in error.items():
        print(f"vllm {job}: mean error {values.mean():.2e}, max {values.max():.2e}")
    assert error["float32-head"].mean() < 0.7 * error["bfloat16"].mean()
    assert json.loads(str(results("classic", "float32-head")["identity"]))["head_dtype"] == "float32"


def test_a_quantised_model(results: Results, expected: Any) -> None:
    result = results("classic", "quantised")
    identity = json.loads(str(result["identity"]))
    assert (identity["quantization"], identity["dtype"]) == ("compressed-tensors", "bfloat16")
    error = np.abs(result["groups"] - expected("quantised", "groups"))
    print(f"vllm quantised: mean error {error.mean():.2e}, max {error.max():.2e}")
    assert error.max() <= 0.3


def test_a_quantised_head_does_not_run_in_float32(results: Results) -> None:
    reason = str(results("classic", "quantised-head")["error"])
    assert "only supported for an unquantized lm_head. (--head-dtype model runs the head as it is)" in reason


def test_too_little_memory_for_the_longest_sample_says_what_to_do(results: Results) -> None:
    reason = str(results("classic", "starved")["error"])
    assert "\n" not in reason
    assert "KV cache" in reason
    assert "--max-length N lowers max_model_len" in reason
