"""What the engine asks vLLM for and does with bad answers; right ones come from vLLM itself in tests/reference."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from pear_data.engines import vllm_engine
from pear_data.engines.vllm_engine import VllmEngine
from pear_data.engines.vllm_paths import targets_available
from pear_data.errors import PearError, UsageError
from pear_data.tokens import TokenBatch

BatchOf = Callable[..., TokenBatch]


class OldParameters(SimpleNamespace):
    prompt_logprob_token_ids: Any


class NewParameters(SimpleNamespace):
    prompt_logprob_token_ids: Any
    prompt_logprob_start: Any


@dataclass
class EngineArguments:
    """In place of `vllm.EngineArgs`: some of its fields."""

    model: str = ""
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    max_model_len: int | None = None
    load_format: str = "auto"
    skip_tokenizer_init: bool = False
    max_logprobs: int = 20
    enforce_eager: bool = False
    use_tqdm_on_load: bool = True
    gpu_memory_utilization: float = 0.92
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    kv_cache_dtype: str = "auto"
    hf_overrides: Any = None
    use_v2: ClassVar[bool] = True

    def create_engine_config(self) -> Any:
        return SimpleNamespace(use_v2_model_runner=self.use_v2)


class FakeProcess:
    """Answers each request with minus the position of each row's token, or as `fault` says; the last one first."""

    def __init__(
        self, model: str, arguments: Callable[[], dict[str, Any]], environment: dict[str, str]
    ) -> None:
        self.arguments, self.environment = arguments(), environment
        self.requests: list[tuple[list[Any], list[Any]]] = []
        self.fault: Callable[[int, np.ndarray], np.ndarray | None] = lambda call, rows: rows
        config = SimpleNamespace(
            max_model_len=self.arguments["max_model_len"],
            get_vocab_size=lambda: 211,
            dtype=torch.float32,
            quantization=None,
        )
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=config))

    def generate(self, prompts: list[Any], parameters: list[Any]) -> Iterator[tuple[int, Any]]:
        if prompts:
            self.requests.append((prompts, parameters))
        for index in reversed(range(len(prompts))):
            if not hasattr(parameters[index], "prompt_logprob_token_ids"):
                ids = prompts[index]["prompt_token_ids"][1:]
                flat = SimpleNamespace(token_ids=ids, logprobs=[-1.0 - i for i in range(len(ids))])
                yield index, SimpleNamespace(prompt_logprobs=flat)
                continue
            targets = parameters[index].prompt_logprob_token_ids
            first = parameters[index].prompt_logprob_start + 1
            rows = np.where(targets < 0, -np.inf, -np.arange(first, first + len(targets))[:, None])
            answer = self.fault(len(self.requests), rows.astype(np.float32))
            yield index, SimpleNamespace(prompt_token_id_logprobs=answer)


@pytest.fixture
def start(llama: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VllmEngine]:
    """Start an engine on stand-ins for vLLM and its process."""
    monkeypatch.setattr(vllm_engine, "VllmProcess", FakeProcess)
    install(monkeypatch, NewParameters, v2=True)

    def build(**options: Any) -> VllmEngine:
        engine = VllmEngine(llama, **options)
        engine._process.requests.clear()
        return engine

    return build


@pytest.fixture
def engine(start: Callable[..., VllmEngine]) -> VllmEngine:
    return start()


def install(monkeypatch: pytest.MonkeyPatch, parameters: type, v2: bool) -> None:
    monkeypatch.setattr(EngineArguments, "use_v2", v2)
    module = SimpleNamespace(SamplingParams=parameters, EngineArgs=EngineArguments, __version__="0.32.0")
    monkeypatch.setitem(sys.modules, "vllm", module)


def ignore(tokens: int) -> None:
    pass


def test_only_the_rows_from_the_first_to_the_last_scored_token_are_asked_for(
    engine: VllmEngine, batch_of: BatchOf
) -> None:
    batch = batch_of("..xx..x..", "...", ".", ".x")
    done: list[int] = []
    assert engine.score(batch, done.append).tolist() == [-2, -3, -6, -1]
    assert done == [4, 2, 9] or done == [4, 9, 2], "first what needs no request, then each as it is finished"
    [(prompts, parameters)] = engine._process.requests
    asked = {len(prompt["prompt_token_ids"]): one for prompt, one in zip(prompts, parameters, strict=True)}
    assert {length: one.prompt_logprob_start for length, one in asked.items()} == {7: 1, 2: 0}
    assert asked[7].prompt_logprob_token_ids.tolist() == batch.input_ids[2:7, None].tolist()
    assert not any(one.skip_reading_prefix_cache for one in parameters)


def test_samples_that_begin_alike_share_rows_and_equal_ones_a_request(
    engine: VllmEngine, batch_of: BatchOf
) -> None:
    once = batch_of("...xxx")
    batch = once.take([0, 0, 0])
    batch.input_ids[-1] += 1
    assert engine.score(batch, ignore).tolist() == [-3, -4, -5] * 3
    [(prompts, parameters)] = engine._process.requests
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [once.input_ids.tolist()]
    last = once.input_ids[-1]
    assert parameters[0].prompt_logprob_token_ids[-1].tolist() == [last, last + 1]


def test_classic_asks_for_each_sample_whole(start: Callable[..., VllmEngine], batch_of: BatchOf) -> None:
    engine = start(path="classic")
    batch = batch_of("...xxx").take([0, 0, 0])
    batch.input_ids[-1] += 1
    assert engine.score(batch, ignore).tolist() == [-3, -4, -5] * 3
    [(prompts, parameters)] = engine._process.requests
    assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [6, 6]
    assert [(one.prompt_logprobs, one.flat_logprobs) for one in parameters] == [(0, True)] * 2


def test_an_answer_about_other_tokens_is_none(start: Callable[..., VllmEngine], batch_of: BatchOf) -> None:
    engine = start(path="classic")
    other = SimpleNamespace(prompt_logprobs=SimpleNamespace(token_ids=[0, 0], logprobs=[-1.0, -2.0]))
    engine._process.generate = lambda prompts, parameters: enumerate([other] * len(prompts))
    with pytest.raises(PearError, match="no log-probs for sample s0"):
        engine.score(batch_of(".xx"), ignore)


def test_an_engine_that_refuses_its_first_request_does_not_start(
    start: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[bool] = []

    def refuse(process: FakeProcess, prompts: list[Any], parameters: list[Any]) -> Iterator[Any]:
        raise PearError("vLLM stopped scoring: expect A to be bfloat16")

    monkeypatch.setattr(FakeProcess, "generate", refuse)
    monkeypatch.setattr(FakeProcess, "stop", lambda process: stopped.append(True), raising=False)
    with pytest.raises(PearError, match="expect A to be bfloat16"):
        start()
    assert stopped == [True]


@pytest.mark.parametrize(
    "bad", [None, np.zeros((1, 1), np.float32), np.array([[-1.0], [np.nan]], np.float32)]
)
def test_bad_answers_are_asked_for_again_without_the_cache(
    engine: VllmEngine, batch_of: BatchOf, bad: np.ndarray | None
) -> None:
    engine._process.fault = lambda call, rows: bad if call == 1 and len(rows) == 2 else rows
    done: list[int] = []
    assert engine.score(batch_of(".xxx", ".xx", ".x"), done.append).tolist() == [-1, -2, -3, -1, -2, -1]
    assert sum(done) == 9
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
        (NewParameters, True, "auto", "targets"),
        (NewParameters, False, "auto", "classic"),
        (OldParameters, True, "auto", "classic"),
        (NewParameters, True, "classic", "classic"),
    ],
)
def test_path(
    parameters: type,
    v2: bool,
    path: str,
    chosen: str,
    start: Callable[..., VllmEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, parameters, v2)
    assert start(path=path).identity()["path"] == chosen


def test_targets_asked_for_where_vllm_has_none(
    start: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, OldParameters, v2=False)
    assert not targets_available({})
    with pytest.raises(UsageError, match=r"path targets: needs vLLM >= 0.32"):
        start(path="targets")
    with pytest.raises(UsageError, match="choose auto, targets or classic"):
        start(path="fast")


def test_engine_arguments_go_over_ours_and_into_the_identity(start: Callable[..., VllmEngine]) -> None:
    given = {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 100, "hf_overrides": {"b": 1, "a": [2]}}
    engine = start(engine_args=given, tensor_parallel=2)
    arguments = engine._process.arguments
    assert given.items() <= arguments.items()
    assert (arguments["tensor_parallel_size"], arguments["max_num_seqs"]) == (2, 100)
    expected = {
        "engine_arg.kv_cache_dtype": "fp8",
        "engine_arg.max_num_batched_tokens": 100,
        "engine_arg.hf_overrides": '{"a": [2], "b": 1}',
        "tensor_parallel": 2,
        "head_dtype": "model",
        "quantization": None,
    }
    assert engine.identity() | expected == engine.identity()


def test_a_refused_engine_argument_starts_nothing(start: Callable[..., VllmEngine]) -> None:
    with pytest.raises(UsageError, match="--engine-arg dtype: --dtype sets it"):
        start(engine_args={"dtype": "float16"})


def test_more_gpus_than_there_are(start: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UsageError, match="--tensor-parallel 2: visible GPUs: 1"):
        start(tensor_parallel=2)
