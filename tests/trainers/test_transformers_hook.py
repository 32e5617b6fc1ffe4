"""Fused and live losses, packs and denominators through the real transformers Trainer: one SGD step each.

Frozen weights, and live ones of the initial policy, against sum(w * nll) / denominator in float64, a row at a time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from two_ranks import run_on_two_ranks

from pear_data import importance_weights
from pear_data.hooks.transformers import PearTrainer
from pear_data.loss import LivePear, PearCollator, attach

TOLERANCE = 2e-6
VOCAB = 83
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, sliding_window=4, final_logit_softcapping=3.0)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**TINY, **MOE, output_router_logits=True, router_aux_loss_coef=0.5)
    ),
}
LAYOUTS = ["padded", "padding_free", "packs"]


def make_model(name: str = "qwen2") -> PreTrainedModel:
    torch.manual_seed(3)
    return MODELS[name]()


def logprobs_of(model: nn.Module, row: dict[str, Any]) -> Tensor:
    """[L], of each token given those before it; 0 for the first."""
    ids = torch.tensor(row["input_ids"])
    found = model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) : -1].log_softmax(-1)
    return torch.cat([found.new_zeros(1), found.gather(1, ids[1:, None])[:, 0]])


def make_rows() -> list[dict[str, Any]]:
    """16 ragged rows, some of two turns; weights from 0 to 3, a tenth 0; two rows are negative."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for i in range(16):
        length = int(torch.randint(5, 41, (), generator=generator))
        ids = torch.randint(2, VOCAB, (length,), generator=generator)
        scored = torch.arange(length) >= length // 3
        scored[3:5] = length > 20
        weights = 3 * torch.rand(length, generator=generator)
        weights = weights * (torch.rand(length, generator=generator) > 0.1) * scored
        if i in (4, 9):
            weights = -0.5 * scored
        columns = {"labels": torch.where(scored, ids, -100), "loss_weights": weights}
        rows.append(
            {
                "sample_id": f"sample-{i}",
                "input_ids": ids.tolist(),
                **{name: column.tolist() for name, column in columns.items()},
            }
        )
    return rows


ROWS = make_rows()


def with_live_columns(model: PreTrainedModel, level: Any, negative_scale: float) -> list[dict[str, Any]]:
    """The rows with a behavior policy's log-probs, and the weights that `pear-data weight` makes of them."""
    generator = torch.Generator().manual_seed(7)
    exact = copy.deepcopy(model).double().eval()
    rows = []
    for row in ROWS:
        scored = torch.tensor(row["labels"]) != -100
        with torch.no_grad():
            target = logprobs_of(exact, row)
        noise = torch.randn(len(scored), generator=generator)
        behavior = ((target - 0.2 * noise + 0.1) * scored).float()
        negative = min(row["loss_weights"]) < 0
        found = importance_weights(
            target[scored].numpy(),
            behavior[scored].double().numpy(),
            [int(scored.sum())],
            level="sequence" if negative else level,
        )
        weights = torch.zeros(len(scored))
        weights[scored] = torch.from_numpy(found) * (-negative_scale if negative else 1.0)
        rows.append(row | {"loss_weights": weights.tolist(), "behavior_logprobs": behavior.tolist()})
    return rows


def packs(rows: list[dict[str, Any]], per_pack: int = 4) -> list[dict[str, Any]]:
    """The rows laid end to end, as `hf-packed` holds them."""
    made = []
    for group in (rows[i : i + per_pack] for i in range(0, len(rows), per_pack)):
        names = [name for name in rows[0] if name != "sample_id"]
        pack: dict[str, Any] = {name: [value for row in group for value in row[name]] for name in names}
        pack["position_ids"] = [t for row in group for t in range(len(row["labels"]))]
        pack["seq_lengths"] = [len(row["labels"]) for row in group]
        made.append(pack | {"sample_ids": [row["sample_id"] for row in group]})
    return made


def divisor_of(normaliser: Any, rows: list[dict[str, Any]]) -> float:
    return {
        "tokens": float(sum(label != -100 for row in rows for label in row["labels"])),
        "weights": sum(weight for row in rows for weight in row["loss_weights"]),
        "sequences": float(len(rows)),
    }.get(normaliser, normaliser)


def weighted_loss(model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """sum(w * nll) of rows run one at a time, unpadded."""
    losses = []
    for row in rows:
        weights = torch.tensor(row["loss_weights"], dtype=torch.float64)
        losses.append(-(weights * logprobs_of(model, row)).sum())
    return torch.stack(losses).sum()


def expected_parameters(model: nn.Module, rows: list[dict[str, Any]], factor: float) -> dict[str, Tensor]:
    """The trained parameters after one SGD step of lr 1 on factor * sum(w * nll), in float64."""
    exact = copy.deepcopy(model).double().train()
    (weighted_loss(exact, rows) * factor).backward()
    return {name: (p - p.grad).detach() for name, p in exact.named_parameters() if p.requires_grad}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - expected[name].double()).abs().max()) for name in expected)


def arguments(tmp_path: Path, layout: str, **changes: Any) -> TrainingArguments:
    """One optimizer step of SGD over all rows: four micro-batches of four rows, or of one pack of four."""
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "trained"),
        "remove_unused_columns": False,
        "per_device_train_batch_size": 1 if layout == "packs" else 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**settings | changes)


def train(
    trainer: type[Trainer],
    model: nn.Module,
    rows: list[dict[str, Any]],
    layout: str,
    tmp_path: Path,
    **changes: Any,
) -> dict[str, Tensor]:
    data = datasets.Dataset.from_list(packs(rows) if layout == "packs" else rows)
    collator = PearCollator(0, padding_free=layout != "padded")
    args = arguments(tmp_path, layout, **changes)
    trainer(model, args, data_collator=collator, train_dataset=data).train()
    return parameters(model)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_a_fused_step_is_the_formula(name: str, layout: str, tmp_path: Path) -> None:
    model = make_model(name)
    expected = expected_parameters(model, ROWS, 1 / divisor_of("tokens", ROWS))
    assert largest_difference(expected, parameters(model)) > 0.05
    found = train(Trainer, attach(model, fused=True), ROWS, layout, tmp_path)
    assert largest_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("layout", ["padded", "packs"])
@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_live_weights_of_the_initial_policy_are_the_frozen_ones(
    level: Any, layout: str, fused: bool, tmp_path: Path
) -> None:
    """Of the rows' own weights the live ones see the sign. A scale of negatives of 0 takes another path."""
    for scale in (0.5, 0.0) if layout == "packs" else (0.5,):
        model = make_model()
        frozen = with_live_columns(model, level, scale)
        signs = [
            row | {"loss_weights": [float(w > 0) - (w < 0) for w in ROWS[i]["loss_weights"]]}
            for i, row in enumerate(frozen)
        ]
        expected = expected_parameters(model, frozen, 1 / divisor_of("tokens", frozen))
        live = LivePear(level=level, negative_scale=scale)
        found = train(Trainer, attach(model, fused=fused, live=live), signs, layout, tmp_path)
        assert largest_difference(found, expected) <= TOLERANCE
        by_frozen = train(Trainer, attach(make_model(), fused=fused), frozen, layout, tmp_path)
        assert largest_difference(found, by_frozen) <= 1e-6
        assert largest_difference(found, parameters(make_model())) > 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normaliser", ["tokens", "weights", "sequences", 100.0])
def test_denominators_over_the_whole_step(normaliser: Any, layout: str, tmp_path: Path) -> None:
    model = make_model()
    expected = expected_parameters(model, ROWS, 0.1 / divisor_of(normaliser, ROWS))
    attach(model, fused=layout != "padded", normaliser=normaliser)
    changes = {"learning_rate": 0.1, "remove_unused_columns": True}
    found = train(PearTrainer, model, ROWS, layout, tmp_path, **changes)
    assert largest_difference(found, expected) <= TOLERANCE
    assert largest_difference(found, parameters(make_model())) > 5e-3


def test_live_weights_by_sequences(tmp_path: Path) -> None:
    model = make_model()
    frozen = with_live_columns(model, "block", 0.5)
    expected = expected_parameters(model, frozen, 0.1 / len(ROWS))
    attach(model, fused=True, live=LivePear(negative_scale=0.5), normaliser="sequences")
    found = train(PearTrainer, model, frozen, "packs", tmp_path, learning_rate=0.1)
    assert largest_difference(found, expected) <= TOLERANCE


def test_a_number_is_the_denominator_of_the_plain_trainer_too(tmp_path: Path) -> None:
    model = make_model()
    expected = expected_parameters(model, ROWS, 0.1 / 100)
    attach(model, fused=True, normaliser=100)
    found = train(Trainer, model, ROWS, "padded", tmp_path, learning_rate=0.1)
    assert largest_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("normaliser", ["weights", "sequences"])
def test_the_plain_trainer_does_not_count_the_rest(normaliser: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"normaliser='{normaliser}', but the Trainer counts the labels"):
        train(Trainer, attach(make_model(), normaliser=normaliser), ROWS, "padded", tmp_path)


@pytest.mark.parametrize("layout", ["padded", "packs"])
def test_the_loss_of_experts_is_kept(layout: str, tmp_path: Path) -> None:
    """What the Trainer makes of it with logits; the weighted part is proved above."""
    found = [
        train(Trainer, attach(make_model("qwen3-moe"), fused=fused), ROWS, layout, tmp_path, seed=1)
        for fused in (True, False)
    ]
    bare = make_model("qwen3-moe")
    bare.config.output_router_logits = False
    assert largest_difference(*found) <= TOLERANCE
    assert largest_difference(found[0], train(Trainer, attach(bare), ROWS, layout, tmp_path, seed=1)) > 1e-3


def test_lora(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, lora_dropout=0.0)
    model = peft.get_peft_model(make_model(), config)
    expected = expected_parameters(model, ROWS, 1 / divisor_of("tokens", ROWS))
    found = train(PearTrainer, attach(model, fused=True), ROWS, "packs", tmp_path)
    assert largest_difference(found, expected) <= TOLERANCE


def test_gradient_checkpointing(tmp_path: Path) -> None:
    model = make_model()
    expected = expected_parameters(model, ROWS, 1 / divisor_of("tokens", ROWS))
    found = train(
        PearTrainer, attach(model, fused=True), ROWS, "packs", tmp_path, gradient_checkpointing=True
    )
    assert largest_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_evaluation_is_divided_by_its_labels(fused: bool, tmp_path: Path) -> None:
    """Weighted where the rows have weights, plain where they have none, and training after it goes on as before."""
    model = make_model()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        labels = divisor_of("tokens", ROWS)
        ones = [row | {"loss_weights": [float(label != -100) for label in row["labels"]]} for row in ROWS]
        weighted, plain = (float(weighted_loss(exact, rows)) / labels for rows in (ROWS, ones))
    expected = expected_parameters(model, ROWS, 0.1 / len(ROWS))
    data = datasets.Dataset.from_list(ROWS)
    trainer = PearTrainer(
        attach(model, fused=fused, normaliser="sequences"),
        arguments(tmp_path, "padded", learning_rate=0.1, per_device_eval_batch_size=len(ROWS)),
        data_collator=PearCollator(0, padding_free=True, require_weights=False),
        train_dataset=data,
        eval_dataset={"weighted": data, "plain": data.remove_columns("loss_weights")},
    )
    found = trainer.evaluate()
    assert found["eval_weighted_loss"] == pytest.approx(weighted, rel=1e-6)
    assert found["eval_plain_loss"] == pytest.approx(plain, rel=1e-6)
    trainer.train()
    assert largest_difference(parameters(model), expected) <= TOLERANCE


def test_a_stream(tmp_path: Path) -> None:
    model = make_model()
    expected = expected_parameters(model, ROWS, 1 / divisor_of("weights", ROWS))
    PearTrainer(
        attach(model, fused=True, normaliser="weights"),
        arguments(tmp_path, "packs"),
        data_collator=PearCollator(0, padding_free=True),
        train_dataset=datasets.Dataset.from_list(packs(ROWS)).to_iterable_dataset(),
    ).train()
    assert largest_difference(parameters(model), expected) <= TOLERANCE


ON_TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "tokens": {"fused": True},
    "weights": {"fused": True, "normaliser": "weights"},
    "sequences": {"normaliser": "sequences", "live": LivePear(negative_scale=0.5)},
}


def on_each_rank(folder: Path) -> None:
    rows = with_live_columns(make_model(), "block", 0.5)
    for name, settings in ON_TWO_PROCESSES.items():
        changes = {"gradient_accumulation_steps": 2, "learning_rate": 0.1}
        found = train(PearTrainer, attach(make_model(), **settings), rows, "packs", folder, **changes)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")


def test_two_processes(tmp_path: Path) -> None:
    run_on_two_ranks(__file__, tmp_path)
    rows = with_live_columns(make_model(), "block", 0.5)
    for name in ON_TWO_PROCESSES:
        expected = expected_parameters(make_model(), rows, 0.1 / divisor_of(name, rows))
        assert largest_difference(torch.load(tmp_path / f"{name}.pt"), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("attached", "settings", "others", "message"),
    [
        ({}, {"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1.*one token"),
        ({}, {"average_tokens_across_devices": False}, {}, "each rank would divide by its own labels"),
        ({}, {}, {"data_collator": list}, "needs data_collator=PearCollator"),
        ({}, {}, {"compute_loss_func": print}, "takes no compute_loss_func"),
        ({"fused": True}, {}, {"compute_metrics": print}, "makes no logits for metrics"),
        (None, {}, {}, "the model is not attached"),
    ],
)
def test_what_would_bypass_a_weight_is_refused(
    attached: dict[str, Any] | None,
    settings: dict[str, Any],
    others: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    model = make_model() if attached is None else attach(make_model(), **attached)
    with pytest.raises(ValueError, match=message):
        PearTrainer(
            model, arguments(tmp_path, "padded", **settings), **{"data_collator": PearCollator(0)} | others
        )


def test_training_rows_without_weights_are_refused(tmp_path: Path) -> None:
    bare = [{name: row[name] for name in ("input_ids", "labels")} for row in ROWS]
    trainer = PearTrainer(
        attach(make_model()),
        arguments(tmp_path, "padded"),
        data_collator=PearCollator(0, require_weights=False),
        train_dataset=datasets.Dataset.from_list(bare),
    )
    with pytest.raises(ValueError, match="a training batch has no loss_weights"):
        trainer.train()


if __name__ == "__main__":
    on_each_rank(Path(sys.argv[1]))
