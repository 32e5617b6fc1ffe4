from __future__ import annotations

import pytest

from pear_data.engines import selection
from pear_data.engines.selection import choose_engine, open_engine
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
