"""What the engine asks vLLM for and does with bad answers; right ones come from vLLM itself in tests/reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pear_data.engines import vllm_engine
from pear_data.engines.vllm_engine import VllmEngine
from pear_data.engines.vllm_paths import Classic, Targets, targets_available
from pear_data.errors import PearError, UsageError
from pear_data.tokens import TokenBatch

BatchOf = Callable[..., TokenBatch]


class OldParameters(SimpleNamespace):
    prompt_logprob_token_ids: Any


class NewParameters(SimpleNamespace):
    prompt_logprob_token_ids: Any
    prompt_logprob_start: Any


class FakeProcess:
    """Answers each request with the position of each row, or as `fault` says."""

    def __init__(
        self, model: str, arguments: Callable[[], dict[str, Any]], environment: dict[str, str]
    ) -> None:
        self.arguments, self.environment = arguments(), environment
        self.requests: list[tuple[list[Any], list[Any]]] = []
        self.fault: Callable[[int, np.ndarray], np.ndarray | None] = lambda call, rows: rows
        config = SimpleNamespace(max_model_len=self.arguments["max_model_len"], get_vocab_size=lambda: 211)
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=config))

    def generate(self, prompts: list[Any], parameters: list[Any]) -> list[Any]:
        self.requests.append((prompts, parameters))
        answers = []
        for prompt, asked in zip(prompts, parameters, strict=True):
            rows = np.arange(
                asked.prompt_logprob_start + 1, len(prompt["prompt_token_ids"]), dtype=np.float32
            )
            answers.append(
                SimpleNamespace(prompt_token_id_logprobs=self.fault(len(self.requests), -rows[:, None]))
            )
        return answers


@pytest.fixture
def engine(llama: str, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    install(monkeypatch, NewParameters, v2=True)
    monkeypatch.setattr(vllm_engine, "VllmProcess", FakeProcess)
    return VllmEngine(llama)


def install(monkeypatch: pytest.MonkeyPatch, parameters: type, v2: bool) -> None:
    def engine_arguments(**arguments: Any) -> Any:
        return SimpleNamespace(create_engine_config=lambda: SimpleNamespace(use_v2_model_runner=v2))

    module = SimpleNamespace(SamplingParams=parameters, EngineArgs=engine_arguments, __version__="0.32.0")
    monkeypatch.setitem(sys.modules, "vllm", module)


def ignore(tokens: int) -> None:
    pass


def test_only_the_rows_from_the_first_to_the_last_scored_token_are_asked_for(
    engine: VllmEngine, batch_of: BatchOf
) -> None:
    batch = batch_of("..xx..x..", "...", ".", ".x")
    done: list[int] = []
    assert engine.score(batch, done.append).tolist() == [-2, -3, -6, -1]
    assert done == [15]
    [(prompts, parameters)] = engine._process.requests
    assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [7, 2]
    assert [asked.prompt_logprob_start for asked in parameters] == [1, 0]
    assert parameters[0].prompt_logprob_token_ids.tolist() == batch.input_ids[2:7, None].tolist()
    assert not any(asked.skip_reading_prefix_cache for asked in parameters)


@pytest.mark.parametrize(
    "bad", [None, np.zeros((1, 1), np.float32), np.array([[-1.0], [np.nan]], np.float32)]
)
def test_bad_answers_are_asked_for_again_without_the_cache(
    engine: VllmEngine, batch_of: BatchOf, bad: np.ndarray | None
) -> None:
    engine._process.fault = lambda call, rows: bad if call == 1 and len(rows) == 2 else rows
    assert engine.score(batch_of(".xxx", ".xx", ".x"), ignore).tolist() == [-1, -2, -3, -1, -2, -1]
    [_, (prompts, parameters)] = engine._process.requests
    assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [3]
    assert parameters[0].skip_reading_prefix_cache


def test_no_answer_twice_is_an_error(engine: VllmEngine, batch_of: BatchOf) -> None:
    engine._process.fault = lambda call, rows: None if len(rows) == 2 else rows
    with pytest.raises(PearError, match="vLLM gave no log-probs for sample s1"):
        engine.score(batch_of(".x", ".xx"), ignore)


def test_what_the_model_makes_non_finite_stays_so(engine: VllmEngine, batch_of: BatchOf) -> None:
    engine._process.fault = lambda call, rows: rows * np.nan
    assert np.isnan(engine.score(batch_of(".xx"), ignore)).all()


def test_nothing_scored_asks_nothing(engine: VllmEngine, batch_of: BatchOf) -> None:
    assert engine.score(batch_of("...", "."), ignore).shape == (0,)
    assert engine._process.requests == []


def test_a_sample_of_all_positions_leaves_room_for_the_token_vllm_wants(engine: VllmEngine) -> None:
    assert engine.max_length == 64
    assert engine._process.arguments["max_model_len"] == 65


@pytest.mark.parametrize(
    ("parameters", "v2", "path", "chosen"),
    [
        (NewParameters, True, "auto", Targets),
        (NewParameters, False, "auto", Classic),
        (OldParameters, True, "auto", Classic),
        (NewParameters, True, "classic", Classic),
    ],
)
def test_path(
    parameters: type, v2: bool, path: str, chosen: type, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, parameters, v2)
    monkeypatch.setattr(vllm_engine, "VllmProcess", FakeProcess)
    engine = VllmEngine(llama, path=path)
    assert engine.identity()["path"] == chosen.name
    assert engine._process.arguments["max_num_batched_tokens"] == chosen.max_num_batched_tokens


def test_targets_asked_for_where_vllm_has_none(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, OldParameters, v2=False)
    monkeypatch.setattr(vllm_engine, "VllmProcess", FakeProcess)
    assert not targets_available({})
    with pytest.raises(UsageError, match=r"path targets: needs vLLM >= 0.32"):
        VllmEngine(llama, path="targets")
    with pytest.raises(UsageError, match="choose auto, targets or classic"):
        VllmEngine(llama, path="fast")
