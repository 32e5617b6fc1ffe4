"""Attaching with `fused=True`: the same loss and gradients as with the logits, on real models made tiny on the spot."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from pear_data.loss import LivePear, PearCollator, attach, batch_loss_fused, chunks
from pear_data.loss.weighted_loss import WeightedLoss

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SPECIAL = [f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")]
SHORT: dict[str, Any] = {"vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
MODELS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "qwen2, tied": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**TINY, tie_word_embeddings=True)),
    "llama, untied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, tie_word_embeddings=False)),
    "gemma2, soft-cap": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**TINY, sliding_window=3, final_logit_softcapping=2.0)
    ),
    "granite, logits / 8": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**TINY, logits_scaling=8.0)),
    "cohere, logits * 0.3": lambda: tf.CohereForCausalLM(tf.CohereConfig(**TINY, logit_scale=0.3)),
    "phi, bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**TINY)),
    "gptj, bias": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**SHORT, rotary_dim=4)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**SHORT)),
    "mamba, float logits": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, eos_token_id=None)
    ),
    "modernbert decoder, a layer before the head": lambda: tf.ModernBertDecoderForCausalLM(
        tf.ModernBertDecoderConfig(**TINY | dict.fromkeys(SPECIAL, 1))
    ),
    "qwen3 moe, auxiliary loss": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**TINY, **MOE, output_router_logits=True, router_aux_loss_coef=0.5)
    ),
    "granite moe": lambda: tf.GraniteMoeForCausalLM(
        tf.GraniteMoeConfig(**TINY, logits_scaling=4.0, num_local_experts=4, num_experts_per_tok=2)
    ),
}
ROWS = [
    {
        "input_ids": [5, 9, 7, 3, 11, 30, 2],
        "labels": [-100, -100, 7, 3, 11, 30, 2],
        "loss_weights": [0, 0, 0.5, 2.0, 0, 1.0, -0.7],
        "behavior_logprobs": [0, 0, -3.0, -4.2, -4.0, -3.9, -4.3],
    },
    {
        "input_ids": [8, 2, 4],
        "labels": [-100, 2, 4],
        "loss_weights": [0, 3.0, 0.2],
        "behavior_logprobs": [0, -5.0, -4.1],
    },
    {
        "input_ids": [1, 6, 60, 44],
        "labels": [-100, -100, 60, 44],
        "loss_weights": [0, 0, 1.5, 1.0],
        "behavior_logprobs": [0, 0, -3.9, -4.1],
    },
]
BATCH = PearCollator(0)(ROWS)
WITH_A_NEGATIVE = [{**ROWS[0], "loss_weights": [0, 0, -1, -1, -1, -1, -1]}, *ROWS[1:]]
TOLERANCE = 2e-6


def make(name: str = "qwen2, tied") -> tf.PreTrainedModel:
    """Without dropout, biases other than 0."""
    torch.manual_seed(0)
    model: tf.PreTrainedModel = MODELS[name]().eval()
    with torch.no_grad():
        for one, parameter in model.named_parameters():
            if one.endswith("bias"):
                parameter.normal_()
    return model


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_equal(fused: nn.Module, whole: nn.Module, batch: dict[str, Any]) -> None:
    expected, found = whole(**batch), fused(**batch)
    assert found.logits is None
    assert expected.logits is not None
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
    wanted, got = gradients(whole, expected.loss), gradients(fused, found.loss)
    assert wanted.keys() == got.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=TOLERANCE, atol=TOLERANCE)
    assert max(float(gradient.abs().max()) for gradient in got.values()) > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_logits(name: str) -> None:
    whole = attach(make(name))
    fused = attach(make(name), fused=True)
    require_equal(fused, whole, BATCH | {"num_items_in_batch": torch.tensor(13)})
    ids = {"input_ids": BATCH["input_ids"]}
    assert torch.equal(fused(**ids).logits, whole(**ids).logits)
    if "auxiliary" in name:
        assert fused(**BATCH).aux_loss == whole(**BATCH).aux_loss != 0


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("level", ["token", "block", "sequence"])
@pytest.mark.parametrize("negative_scale", [0.0, 0.5])
def test_live_weights(
    monkeypatch: pytest.MonkeyPatch, level: Any, padding_free: bool, negative_scale: float, fits: bool
) -> None:
    """Whether whole sequences fit in a chunk, or their log-probs come first."""
    monkeypatch.setattr(chunks, "_CHUNK_ROWS", {4: 4 if fits else 1})
    monkeypatch.setattr(chunks, "_LARGE_CHUNK_BYTES", 5 * 61 * 4 if fits else 0)
    live = LivePear(level=level, negative_scale=negative_scale, block_size=2)
    batch = PearCollator(0, padding_free)(WITH_A_NEGATIVE)
    whole, fused = attach(make(), live=live), attach(make(), fused=True, live=live)
    require_equal(fused, whole, batch)
    positive = PearCollator(0, padding_free)([ROWS[1], ROWS[2]])
    require_equal(fused, whole, positive)


@pytest.mark.parametrize("backend", ["ours", "torch"])
@pytest.mark.parametrize("live", [LivePear("token"), LivePear("sequence"), LivePear(negative_scale=0.5)])
def test_live_weights_put_no_token_through_the_head_twice(
    monkeypatch: pytest.MonkeyPatch, live: LivePear, backend: str
) -> None:
    twice: list[Tensor] = []
    monkeypatch.setattr(batch_loss_fused, "linear_logprobs", lambda *args, **_: twice.append(args[0]))
    fused = attach(make(), fused=True, live=live, backend=backend)
    require_equal(fused, attach(make(), live=live), PearCollator(0)(WITH_A_NEGATIVE))
    assert not twice


def test_padding_free_batches_rows_that_weigh_nothing_and_no_labels() -> None:
    whole, fused = attach(make()), attach(make(), fused=True)
    require_equal(fused, whole, PearCollator(0, padding_free=True, pad_to_multiple_of=8)(ROWS))
    unscored = BATCH | {"labels": torch.full_like(BATCH["labels"], -100)}
    loss = fused(**unscored).loss
    assert loss == 0.0
    assert not any(gradient.any() for gradient in gradients(fused, loss).values())


@pytest.mark.parametrize("normaliser", ["weights", "sequences", 7.0])
def test_normalisers_of_a_step_of_one_batch(normaliser: Any) -> None:
    """Worked out by hand; the labels in evaluation."""
    denominator = {"weights": 8.5, "sequences": 3.0, 7.0: 7.0}[normaliser]
    tokens = attach(make())
    for fused in (False, True):
        model = attach(make(), fused=fused, normaliser=normaliser)
        expected = float(tokens(**BATCH).loss) * 9 / denominator
        assert float(model(**BATCH).loss) == pytest.approx(expected, rel=1e-6)
        flat = PearCollator(0, padding_free=True)(ROWS)
        assert float(model(**flat).loss) == pytest.approx(expected, rel=1e-5)
        assert float(model(**BATCH, loss_denominator=3).loss) == pytest.approx(
            float(tokens(**BATCH).loss) * 3, rel=1e-6
        )
        with torch.no_grad():
            assert float(model(**BATCH).loss) == pytest.approx(float(tokens(**BATCH).loss), rel=1e-6)
        if isinstance(normaliser, str):
            with pytest.raises(ValueError, match=r"counts the labels of a step: train with .*PearTrainer"):
                model(**BATCH, num_items_in_batch=9)
        else:
            assert float(model(**BATCH, num_items_in_batch=9).loss) == pytest.approx(expected, rel=1e-6)


def test_gradient_checkpointing() -> None:
    whole, fused = attach(make()), attach(make(), fused=True)
    fused.gradient_checkpointing_enable()
    fused.train()
    require_equal(fused, whole, BATCH)


def test_under_autocast_it_is_no_worse_than_the_logits() -> None:
    exact = make().double()
    reference = gradients(exact, attach(exact)(**BATCH).loss)

    def error(model: nn.Module) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**BATCH).loss
        found = gradients(model, loss)
        return max(float((found[name].double() - reference[name]).abs().max()) for name in reference)

    assert error(attach(make(), fused=True)) <= 1.2 * error(attach(make()))


def test_unweighted_batches_and_generation_are_plain() -> None:
    plain, fused = make(), attach(make(), fused=True)
    unweighted = {name: BATCH[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        assert float(fused(**unweighted).loss) == pytest.approx(float(plain(**unweighted).loss), rel=1e-6)
        ids = BATCH["input_ids"][:1, :4]
        made = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (plain, fused)]
    assert torch.equal(*made)
    assert isinstance(fused(**BATCH, return_dict=False), tuple)


def test_a_forward_that_failed_leaves_nothing_behind() -> None:
    fused = attach(make(), fused=True)
    with pytest.raises(ValueError, match="must have one shape"):
        fused(**BATCH | {"loss_weights": torch.ones(1, 2)})
    assert fused(input_ids=BATCH["input_ids"]).logits.shape == (3, 7, 61)


def test_fewer_logits_than_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="leave logits_to_keep out where there are labels"):
        attach(make(), fused=True)(**BATCH, logits_to_keep=2)


def test_labels_by_position_are_refused() -> None:
    model = attach(make(), fused=True)
    with pytest.raises(RuntimeError, match="give labels by keyword"):
        model(BATCH["input_ids"], None, None, None, None, BATCH["labels"], loss_weights=BATCH["loss_weights"])


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_attached_on_their_own(twin_of: Any) -> None:
    model = attach(make(), fused=True)
    twin = twin_of(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    require_equal(twin, attach(make()), BATCH)


@pytest.mark.parametrize("attach_first", [True, False])
def test_torch_compile(attach_first: bool) -> None:
    model = make()
    if attach_first:
        attach(model, fused=True)
    torch._dynamo.reset()
    compiled: Any = attach(torch.compile(model, backend="eager"), fused=True)
    expected = float(attach(make())(**BATCH).loss)
    for _ in range(3):
        outputs = compiled(**BATCH)
        assert float(outputs.loss) == pytest.approx(expected, rel=1e-6)
        assert outputs.logits is None
    assert compiled(input_ids=BATCH["input_ids"]).logits.shape == (3, 7, 61)


def test_lora_elsewhere_trains_the_same() -> None:
    def adapted(fused: bool) -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return attach(peft.get_peft_model(make(), config), fused=fused)

    require_equal(adapted(True), adapted(False), BATCH)


def require_untouched(model: Any) -> None:
    assert "forward" not in model.get_output_embeddings().__dict__
    assert not isinstance(model.loss_function, WeightedLoss)
    assert not model._forward_hooks


@pytest.mark.parametrize(
    "config", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_heads_with_adapters_are_refused(config: dict[str, Any]) -> None:
    untied = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY))
    model = peft.get_peft_model(untied, peft.LoraConfig(**{"target_modules": ["q_proj"]} | config))
    with pytest.raises(
        ValueError, match=r"cannot fuse the head of LlamaForCausalLM: it is a peft\..*fused=False"
    ):
        attach(model, fused=True)
    require_untouched(untied)


@pytest.mark.parametrize(
    "config", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_adapters_put_on_an_attached_head_are_noticed(config: dict[str, Any]) -> None:
    untied = attach(tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)), fused=True)
    model = peft.get_peft_model(untied, peft.LoraConfig(**{"target_modules": ["q_proj"]} | config))
    with pytest.raises((RuntimeError, TypeError, AttributeError), match=r"logits|DeferredLogits"):
        model(**BATCH)


class AddsToLogits(tf.Qwen2ForCausalLM):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state) + 1.0
        return self.loss_function(logits, labels, self.vocab_size, **kwargs)


class ScalesUnseen(tf.Qwen2ForCausalLM):
    """Looks at what it has before it changes it."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        if isinstance(logits, Tensor):
            logits = logits * 2
        return self.loss_function(logits, labels, self.vocab_size, **kwargs)


class LearnsItsScale(tf.Qwen2ForCausalLM):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state) * torch.ones((), requires_grad=True)
        return self.loss_function(logits, labels, self.vocab_size, **kwargs)


class ShiftsItself(tf.Qwen2ForCausalLM):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return self.loss_function(logits[:, :-1], labels, self.vocab_size, **kwargs)


@pytest.mark.parametrize("model_class", [AddsToLogits, ScalesUnseen, LearnsItsScale, ShiftsItself])
def test_forwards_that_do_more_to_their_logits_are_refused(model_class: Any) -> None:
    model = model_class(tf.Qwen2Config(**TINY))
    with pytest.raises(
        ValueError, match=rf"cannot fuse the head of {model_class.__name__}: .*fused=False"
    ) as error:
        attach(model, fused=True)
    assert "\n" not in str(error.value)
    require_untouched(model)
    attach(model)


def test_the_proof_needs_no_memory_and_no_randomness() -> None:
    with torch.device("meta"):
        model = tf.Gemma2ForCausalLM(tf.Gemma2Config(**TINY, sliding_window=3))
    state = torch.get_rng_state()
    attach(model, fused=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model.model, tf.Gemma2Model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "torch"}, "backend 'torch' is one of the fused loss"),
        ({"normaliser": "weights", "live": LivePear()}, "live weights are not known before the step"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(make(), **settings)


def test_attaching_again_with_other_settings_is_refused() -> None:
    model = attach(make(), fused=True)
    assert attach(model, fused=True) is model
    with pytest.raises(ValueError, match=r"attached already, with LossSettings\(fused=True"):
        attach(model)


def test_another_backend() -> None:
    require_equal(attach(make(), fused=True, backend="torch"), attach(make()), BATCH)
    with pytest.raises(ValueError, match="backend 'none' is unknown"):
        attach(make(), fused=True, backend="none")(**BATCH)


def test_live_weights_need_fine_behavior_logprobs() -> None:
    for fused in (False, True):
        model = attach(make(), fused=fused, live=LivePear())
        with pytest.raises(ValueError, match="the batch has no behavior_logprobs: export with --live"):
            model(**{name: column for name, column in BATCH.items() if name != "behavior_logprobs"})
        with pytest.raises(ValueError, match="behavior_logprobs came as torch.bfloat16"):
            model(**BATCH | {"behavior_logprobs": BATCH["behavior_logprobs"].bfloat16()})
