"""How failures, output and environment variables are handled, with a stand-in for vLLM that fails on purpose."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pear_data.engines.vllm_process import VllmProcess
from pear_data.errors import PearError

LOGGED = b"""ERROR 11-23 [core.py] EngineCore failed to start.
Traceback (most recent call last):
  File "core.py", line 1, in run
ValueError: Free memory on device cuda:0 is less than desired.
Exception: WorkerProc initialization failed due to an exception. See stack trace for root cause.
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], SimpleNamespace]:
    """Put a module with this `LLM` in vLLM's place; it counts how it was shut down."""
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)

    def install(llm: Callable[..., Any]) -> SimpleNamespace:
        seen = SimpleNamespace(shutdowns=0, cleanups=0)
        in_process = SimpleNamespace(VLLM_ENABLE_V1_MULTIPROCESSING=False)

        def shutdown() -> None:
            seen.shutdowns += 1

        def cleanup() -> None:
            seen.cleanups += 1

        def construct(**arguments: Any) -> Any:
            engine = llm(**arguments) or SimpleNamespace()
            engine.engine_core = SimpleNamespace(shutdown=shutdown)
            return SimpleNamespace(llm_engine=engine, enqueue=getattr(engine, "enqueue", None))

        distributed = SimpleNamespace(cleanup_dist_env_and_memory=cleanup)
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=construct, envs=in_process))
        monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
        return seen

    return install


def start(environment: dict[str, str] | None = None) -> VllmProcess:
    return VllmProcess("team/tiny", lambda: {"model": "team/tiny"}, environment or {})


def test_variables_are_set_while_it_runs_and_the_users_stay(
    stand_in: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = stand_in(lambda model: None)
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    process = start({"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "3"})
    assert os.environ["VLLM_NO_USAGE_STATS"] == "0"
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "3"
    process.stop()
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    assert (seen.shutdowns, seen.cleanups) == (1, 1)


def noisy(model: str) -> None:
    os.write(1, b"INFO loading\n")
    os.write(2, b"a bar from a child\n")


def test_its_output_stays_off_the_terminal(
    stand_in: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(noisy)
    start().stop()
    print("ours")
    assert capfd.readouterr() == ("ours\n", "")


def test_its_output_is_shown_when_asked_for(
    stand_in: Callable[..., Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(noisy)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    start().stop()
    assert capfd.readouterr() == ("INFO loading\n", "a bar from a child\n")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("No available memory for the cache blocks.\nTry more.", "No available memory for the cache blocks."),
        (
            "1 validation error for ModelConfig\n  Value error, Model architectures ['X'] are not supported. "
            "[type=value_error, input_value=1]\n  For further information visit",
            r"Model architectures \['X'\] are not supported.",
        ),
        (
            "1 validation error for CacheConfig\ncache_dtype\n  Input should be 'auto' or 'fp8' "
            "[type=literal_error, input_value='fp9']\n    For further information visit",
            "cache_dtype: Input should be 'auto' or 'fp8'",
        ),
        ("Engine core initialization failed. See root cause above.", "Free memory on device cuda:0 is less"),
        (
            "Try decreasing `max_model_len`.",
            r"Try decreasing `max_model_len`. \(--max-length N lowers max_model_len, --tensor-parallel N spreads",
        ),
        ("A head_dtype different from the model dtype", r".* \(--head-dtype model runs the head as it is\)"),
        ("float32 is no dtype for method gptq.", r".* \(--dtype sets it\)"),
        ("", "RuntimeError"),
    ],
)
def test_a_failed_start_is_one_line_and_leaves_nothing(
    message: str, reason: str, stand_in: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(model: str) -> None:
        os.write(2, LOGGED)
        raise RuntimeError(message)

    stand_in(fail)
    with pytest.raises(PearError, match=f"vLLM cannot start with team/tiny: {reason}") as raised:
        start({"VLLM_CPU_KVCACHE_SPACE": "3"})
    assert "\n" not in str(raised.value)
    assert not any(name.startswith("VLLM_") for name in os.environ)
    assert capfd.readouterr() == ("", "")


class Engine:
    """Finishes the last request first, after an answer to one of an earlier call; then its child logs why and dies."""

    def __init__(self) -> None:
        self.waiting = ["9"]
        self.childs_stderr = os.dup(2)

    def enqueue(self, prompts: list[Any], parameters: list[Any], use_tqdm: bool) -> list[str]:
        self.waiting += [str(10 + i) for i in range(len(prompts))]
        return [f"{10 + i}-a1b2c3d4" for i in range(len(prompts))]

    def has_unfinished_requests(self) -> bool:
        return True

    def step(self) -> list[Any]:
        if not self.waiting:
            os.write(self.childs_stderr, LOGGED)
            os.close(self.childs_stderr)
            raise RuntimeError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
        running = SimpleNamespace(finished=False, request_id=self.waiting[-1])
        identifier = self.waiting.pop(0 if "9" in self.waiting else -1)
        return [running, SimpleNamespace(finished=True, request_id=identifier)]


def test_requests_are_told_apart_and_an_engine_that_dies_is_one_line(stand_in: Callable[..., Any]) -> None:
    stand_in(lambda model: Engine())
    process = start()
    answers = process.generate(["a", "b"], [None, None])
    assert [(index, output.request_id) for index, output in (next(answers), next(answers))] == [
        (1, "11"),
        (0, "10"),
    ]
    with pytest.raises(PearError, match="vLLM stopped scoring with team/tiny: Free memory on device"):
        next(answers)
    process.stop()
