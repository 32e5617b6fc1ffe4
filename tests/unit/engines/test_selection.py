from __future__ import annotations

import re

import pytest

from pear_data.engines import selection
from pear_data.engines.selection import choose_engine, engine_arguments, open_engine
from pear_data.engines.transformers_engine import TransformersEngine
from pear_data.errors import UsageError


@pytest.mark.parametrize(
    ("installed", "gpu", "chosen", "why"),
    [
        (True, True, "vllm", "installed and a GPU is visible"),
        (True, False, "transformers", "no GPU is visible"),
        (False, True, "transformers", "vLLM is not installed"),
        (False, False, "transformers", "vLLM is not installed"),
    ],
)
def test_auto(installed: bool, gpu: bool, chosen: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    name, sentence = choose_engine("auto")
    assert name == chosen
    assert why in sentence


def test_vllm_asked_for_and_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'pear-data\[vllm\]'"):
        open_engine("vllm", "any")


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError, match="choose auto, transformers or vllm"):
        choose_engine("sglang")


def test_options_reach_the_engine(llama: str) -> None:
    engine, sentence = open_engine("transformers", llama, dtype="bfloat16", max_length=9)
    assert isinstance(engine, TransformersEngine)
    assert (engine.identity()["dtype"], engine.max_length) == ("bfloat16", 9)
    assert sentence == "Scoring with transformers, as asked."


def test_options_of_vllm_s_alone(llama: str) -> None:
    with pytest.raises(
        UsageError, match=r"--tensor-parallel is vLLM's alone, and: Scoring with transformers, as"
    ):
        open_engine("transformers", llama, tensor_parallel=2)
    with pytest.raises(UsageError, match="--engine-arg is vLLM's alone"):
        open_engine("transformers", llama, engine_args={"seed": 1})
    engine, _ = open_engine("transformers", llama, head_dtype="float32")
    assert engine.identity() == open_engine("transformers", llama)[0].identity()


def test_engine_arguments() -> None:
    given = (
        "gpu_memory_utilization=0.8",
        "kv-cache-dtype=fp8",
        "seed=7",
        "a={x: [1, true]}",
        "quantization=a=b",
    )
    assert engine_arguments(given) == {
        "gpu_memory_utilization": 0.8,
        "kv_cache_dtype": "fp8",
        "seed": 7,
        "a": {"x": [1, True]},
        "quantization": "a=b",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("seed",), "--engine-arg seed: give KEY=VALUE"),
        (("=7",), "--engine-arg =7: give KEY=VALUE"),
        (("seed=1", "seed=2"), "--engine-arg seed=2: seed is given twice"),
        (("a-b=1", "a_b=2"), "a_b is given twice"),
        (("seed={",), "--engine-arg seed={: the value is no YAML"),
    ],
)
def test_engine_arguments_that_cannot_be_read(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        engine_arguments(given)
