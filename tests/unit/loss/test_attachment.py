"""Attaching to real models of several architectures, made tiny on the spot."""

from __future__ import annotations

import copy
import pickle
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pear_data.loss import PearCollator, attach

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, sliding_window=3)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
}
BATCH: dict[str, Any] = PearCollator(0)(
    [
        {"input_ids": [5, 9, 7, 3], "labels": [-100, 9, 7, 3], "loss_weights": [0, 0.5, 2.0, 1.0]},
        {"input_ids": [8, 2], "labels": [-100, 2], "loss_weights": [0, 3.0]},
    ]
)


@pytest.fixture
def qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return MODELS["qwen2"]().eval()


def expected_loss(model: nn.Module) -> float:
    """The formula on the model's logits."""
    with torch.no_grad():
        logits = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits.double()
    nll = -logits[:, :-1].log_softmax(-1).gather(2, BATCH["input_ids"][:, 1:, None])[..., 0]
    return float((nll * BATCH["loss_weights"][:, 1:]).sum() / 4)


def loss_of(model: nn.Module, batch: dict[str, Any]) -> float:
    with torch.no_grad():
        loss: Tensor = model(**batch).loss
    return float(loss)


@pytest.mark.parametrize("name", MODELS)
def test_weights_reach_the_loss(name: str) -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[name]().eval()
    plain = loss_of(model, {k: v for k, v in BATCH.items() if k != "loss_weights"})
    assert loss_of(model, BATCH) == plain, "a model that was not attached ignores weights, as documented"
    assert attach(model) is model
    assert loss_of(model, BATCH) == pytest.approx(expected_loss(model), rel=1e-6)
    assert loss_of(model, {**BATCH, "num_items_in_batch": torch.tensor(8)}) == pytest.approx(
        expected_loss(model) / 2, rel=1e-6
    )
    assert loss_of(model, {k: v for k, v in BATCH.items() if k != "loss_weights"}) == plain


def test_attaching_twice_is_attaching_once(qwen2: Qwen2ForCausalLM) -> None:
    loss = attach(qwen2).loss_function
    assert attach(qwen2).loss_function is loss
    assert len(qwen2._forward_hooks) == 2


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_attached_on_their_own(qwen2: Qwen2ForCausalLM, duplicate: Any) -> None:
    twin = duplicate(attach(qwen2))
    assert loss_of(twin, BATCH) == pytest.approx(expected_loss(qwen2), rel=1e-6)
    assert twin.loss_function is not qwen2.loss_function
    assert not qwen2.loss_function.weights_arrived


@pytest.fixture
def one_process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("attach_first", [True, False])
def test_ddp(qwen2: Qwen2ForCausalLM, attach_first: bool) -> None:
    expected = expected_loss(qwen2)
    if attach_first:
        attach(qwen2)
    model = nn.parallel.DistributedDataParallel(qwen2)
    assert attach(model) is model
    assert loss_of(model, BATCH) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("attach_first", [True, False])
def test_torch_compile_keeps_one_graph(qwen2: Qwen2ForCausalLM, attach_first: bool) -> None:
    expected = expected_loss(qwen2)
    if attach_first:
        attach(qwen2)
    torch._dynamo.reset()
    model: Any = attach(torch.compile(qwen2, backend="eager", fullgraph=True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert loss_of(model, BATCH) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            BertForMaskedLM(BertConfig(**TINY)),
            "BertForMaskedLM: its loss is not transformers' next-token loss",
        ),
        (
            MoonshineForConditionalGeneration(
                MoonshineConfig(vocab_size=61, hidden_size=16, intermediate_size=24, pad_token_id=0)
            ),
            "MoonshineForConditionalGeneration: its loss is not",
        ),
        (nn.Linear(2, 2), "Linear: its loss is not transformers' next-token loss"),
        (
            BartForCausalLM(
                BartConfig(vocab_size=61, d_model=16, decoder_layers=1, decoder_attention_heads=2)
            ),
            "BartForCausalLM: its",
        ),
    ],
)
def test_models_that_cannot_take_weights_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"cannot attach to {message}"):
        attach(model)


class WithoutKwargs(Qwen2ForCausalLM):
    """A forward of the older kind, which names its arguments and swallows nothing."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return self.loss_function(logits, labels, self.vocab_size)


class OwnLoss(Qwen2ForCausalLM):
    """A forward that takes any keyword and computes a loss of its own."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("model_class", [WithoutKwargs, OwnLoss])
def test_a_forward_that_keeps_kwargs_to_itself_is_refused(model_class: type[Qwen2ForCausalLM]) -> None:
    with pytest.raises(
        ValueError, match=rf"{model_class.__name__}: its forward does not pass keyword arguments"
    ):
        attach(model_class(Qwen2Config(**TINY)))


def test_a_head_swapped_in_later_is_noticed(qwen2: Qwen2ForCausalLM) -> None:
    """What a fused head does when the Trainer patches it in: forward computes the loss itself."""
    attach(qwen2)
    qwen2.forward = OwnLoss.forward.__get__(qwen2)
    with pytest.raises(RuntimeError, match="the loss was computed without them"):
        qwen2(BATCH["input_ids"], labels=BATCH["labels"], loss_weights=BATCH["loss_weights"])


def test_training_without_weights_warns(qwen2: Qwen2ForCausalLM) -> None:
    attach(qwen2)
    unweighted = {k: v for k, v in BATCH.items() if k != "loss_weights"}
    with pytest.warns(UserWarning, match="this training step is unweighted"):
        qwen2(**unweighted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(qwen2, unweighted)
        qwen2(**BATCH)
        qwen2(input_ids=BATCH["input_ids"])
