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

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import corpus, reference_logprobs, save_batch, save_model

from pear_data.tokens import TokenBatch


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a tiny model of a kind, made once."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda kind: save_model(folder, kind))


@pytest.fixture(scope="session")
def engine_corpus() -> TokenBatch:
    return corpus()


@pytest.fixture(scope="session")
def expected(model_dir: Callable[[str], str], engine_corpus: TokenBatch) -> Callable[[str], np.ndarray]:
    """Reference log-probs of the corpus under a kind of model, float64."""
    return cache(lambda kind: reference_logprobs(model_dir(kind), engine_corpus))


VLLM_KINDS = {"classic": ["qwen2", "llama-tied", "gemma2"], "spawned": ["qwen2"], "targets": ["qwen2"]}


@pytest.fixture(scope="session")
def vllm_results(
    model_dir: Callable[[str], str], engine_corpus: TokenBatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], dict[str, np.ndarray]]]:
    """What `vllm_child.py` found in a mode under a kind of model; all its processes run side by side."""
    folder = tmp_path_factory.mktemp("vllm")
    batch = save_batch(folder / "batch.npz", engine_corpus)
    children = {}
    for mode, kinds in VLLM_KINDS.items():
        jobs = [
            {"model": model_dir(kind), "batch": batch, "result": str(folder / f"{mode}-{kind}.npz")}
            for kind in kinds
        ]
        (folder / f"{mode}.json").write_text(json.dumps(jobs))
        children[mode] = _start(mode, folder)

    @cache
    def outcome(mode: str) -> None:
        assert children[mode].wait(timeout=500) == 0, (folder / f"{mode}.out").read_text()
        assert (folder / f"{mode}.out").read_text() == "", "vLLM must leave the terminal alone"
        assert not _left_of_session(children[mode].pid)

    def result(mode: str, kind: str) -> dict[str, np.ndarray]:
        outcome(mode)
        return dict(np.load(folder / f"{mode}-{kind}.npz"))

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
