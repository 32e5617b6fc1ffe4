from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from pear_data.engines import transformers_engine
from pear_data.engines.transformers_engine import TransformersEngine
from pear_data.errors import PearError, UsageError
from pear_data.tokens import TokenBatch

BatchOf = Callable[..., TokenBatch]
MASKS = ("..xx", ".", ".x.x..", "....", ".x", "." + "x" * 63, "..xxx....xx..x")


def ignore(tokens: int) -> None:
    pass


def reference(model: str, batch: TokenBatch) -> np.ndarray:
    loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    pieces = []
    for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        ids = torch.from_numpy(batch.input_ids[start:end].astype(np.int64))
        with torch.inference_mode():
            logprobs = loaded(ids[None]).logits[0, :-1].double().log_softmax(-1)
        pieces.append(logprobs.gather(1, ids[1:, None])[:, 0].numpy()[batch.loss_mask[start + 1 : end]])
    return np.concatenate(pieces)


@pytest.mark.parametrize(("fixture", "head"), [("llama", "blocked"), ("bert_decoder", "model")])
@pytest.mark.parametrize("forward_tokens", [1, 70, 10_000])
def test_logprobs_in_the_batch_order_whatever_the_forward_size(
    fixture: str,
    head: str,
    forward_tokens: int,
    batch_of: BatchOf,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(transformers_engine.FORWARD_TOKENS, "cpu", forward_tokens)
    model, batch = request.getfixturevalue(fixture), batch_of(*MASKS)
    engine = TransformersEngine(model, device="cpu")
    assert engine.identity()["head"] == head
    done: list[int] = []
    found = engine.score(batch, done.append)
    assert found.dtype == np.float32
    assert sum(done) == len(batch.input_ids)
    np.testing.assert_allclose(found, reference(model, batch), atol=1e-5)


@pytest.mark.parametrize("masks", [(".",), ("...", "."), ()])
def test_samples_without_scored_tokens_give_nothing(
    llama: str, batch_of: BatchOf, masks: tuple[str, ...]
) -> None:
    assert TransformersEngine(llama, device="cpu").score(batch_of(*masks), ignore).shape == (0,)


def test_max_length(llama: str, batch_of: BatchOf) -> None:
    assert TransformersEngine(llama, device="cpu").max_length == 64
    engine = TransformersEngine(llama, device="cpu", max_length=5)
    assert len(engine.score(batch_of("....x"), ignore)) == 1
    with pytest.raises(ValueError, match="sample s0 has 6 tokens"):
        engine.score(batch_of(".....x"), ignore)
    with pytest.raises(UsageError, match="has 64 positions"):
        TransformersEngine(llama, device="cpu", max_length=65)


def test_identity_and_bfloat16(llama: str, batch_of: BatchOf) -> None:
    batch = batch_of(*MASKS)
    exact, rounded = (
        TransformersEngine(llama, device="cpu"),
        TransformersEngine(llama, device="cpu", dtype="bfloat16"),
    )
    differing = {name for name, value in exact.identity().items() if rounded.identity()[name] != value}
    assert differing == {"dtype"}
    assert exact.identity()["dtype"] == "float32"
    error = np.abs(exact.score(batch, ignore) - rounded.score(batch, ignore)).max()
    assert 1e-4 < error < 0.5


def test_options_it_cannot_take(llama: str) -> None:
    with pytest.raises(UsageError, match="--dtype int8: choose auto, float32"):
        TransformersEngine(llama, dtype="int8")
    with pytest.raises(UsageError, match="device tpu"):
        TransformersEngine(llama, device="tpu")


def test_an_id_outside_the_vocabulary_is_refused(llama: str, batch_of: BatchOf) -> None:
    batch = batch_of("..x")
    batch.input_ids[1] = 211
    with pytest.raises(ValueError, match="token id 211"):
        TransformersEngine(llama, device="cpu").score(batch, ignore)


def test_a_model_that_sees_later_tokens_is_refused(bert_encoder: str) -> None:
    with pytest.raises(PearError, match="depend on later tokens"):
        TransformersEngine(bert_encoder, device="cpu")


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(PearError, match="a t5 model is not a causal language model"):
        TransformersEngine(str(tmp_path))


def test_weights_that_would_be_random_are_refused(llama: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PearError, match=r"lacks 1 weights \(model.norm.weight"):
        TransformersEngine(str(tmp_path))


def test_damaged_weights_are_one_line(llama: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(PearError, match="cannot load the model .*: Error while deserializing header"):
        TransformersEngine(str(tmp_path))


def test_pickled_weights_are_refused(llama: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PearError, match="cannot load the model"):
        TransformersEngine(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("./absent", "no such model directory"), ("absent/model", "cannot load"), ("not a name", "cannot load")],
)
def test_a_model_that_is_not_there_is_one_line(name: str, reason: str, offline: Path) -> None:
    with pytest.raises(PearError, match=reason) as raised:
        TransformersEngine(name)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_close_frees_the_model(llama: str, batch_of: BatchOf) -> None:
    engine = TransformersEngine(llama, device="cpu")
    engine.close()
    assert engine._model is None
