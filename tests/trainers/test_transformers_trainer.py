"""An export trained by the real transformers Trainer: one SGD step against sum(w * nll) / N worked out in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from pear_data.loss import PearCollator, attach, weighted_nll
from pear_data.schema import EXPORT_HF

VOCAB = 83
PAD = 0
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS: dict[str, Callable[[str], PreTrainedModel]] = {
    "qwen2": lambda attention: Qwen2ForCausalLM(Qwen2Config(**TINY, attn_implementation=attention)),
    "llama": lambda attention: LlamaForCausalLM(LlamaConfig(**TINY, attn_implementation=attention)),
    "gemma2": lambda attention: Gemma2ForCausalLM(
        Gemma2Config(**TINY, sliding_window=4, attn_implementation=attention)
    ),
}
TOLERANCE = 2e-6


def make_rows(count: int = 16) -> list[dict[str, Any]]:
    """Ragged rows of 4 to 40 tokens, some of two turns; weights from 0 to 6, a tenth 0, a twentieth negative."""
    generator = torch.Generator().manual_seed(11)

    def draw(low: int, high: int, size: int = 1) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    rows = []
    for i in range(count):
        length = int(draw(4, 41))
        ids = draw(1, VOCAB, length)
        scored = torch.arange(length) >= int(draw(1, length))
        if length > 20:
            scored[5:9] = True
        chance = torch.rand(length, generator=generator)
        weights = 6 * torch.rand(length, generator=generator)
        weights = torch.where(chance < 0.1, 0.0, torch.where(chance > 0.95, -weights, weights)) * scored
        rows.append(
            {
                "sample_id": f"sample-{i}",
                "source": "made",
                "input_ids": ids.tolist(),
                "attention_mask": [1] * length,
                "labels": torch.where(scored, ids, -100).tolist(),
                "loss_weights": weights.tolist(),
            }
        )
    return rows


ROWS = make_rows()
NUM_SCORED = sum(label != -100 for row in ROWS for label in row["labels"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    """The rows as an export holds them, loaded as a user loads them."""
    folder = tmp_path_factory.mktemp("export")
    pq.write_table(pa.Table.from_pylist(ROWS, EXPORT_HF), folder / "train-00000.parquet")
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"))


@pytest.fixture
def tiny() -> PreTrainedModel:
    return make_model("qwen2")


def make_model(name: str, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(3)
    return MODELS[name](attention)


def arguments(tmp_path: Path, **changes: Any) -> TrainingArguments:
    """One optimizer step of SGD with lr 1 over all rows: four micro-batches of four."""
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "trained"),
        "remove_unused_columns": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**settings | changes)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert set(actual) == set(expected)
    return max(float((actual[name].double() - expected[name].double()).abs().max()) for name in expected)


def weighted_loss(model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """sum(w * nll) / N of rows run one at a time, unpadded: written from the formula, with none of our code."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        logprobs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        for t, weight in enumerate(row["loss_weights"]):
            if row["labels"][t] != -100:
                total = total - weight * logprobs[t - 1, ids[t]]
    return total / sum(label != -100 for row in rows for label in row["labels"])


def expected_parameters(model: PreTrainedModel, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The parameters after one SGD step of lr 1, in float64."""
    exact = copy.deepcopy(model).double().train()
    weighted_loss(exact, rows).backward()
    return {
        name: value.detach() - (0 if value.grad is None else value.grad)
        for name, value in exact.named_parameters()
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding_free"])
@pytest.mark.parametrize("name", MODELS)
def test_one_step_is_the_formula(
    name: str,
    padding_free: bool,
    attention: str,
    exported: datasets.Dataset,
    tmp_path: Path,
) -> None:
    model = make_model(name, attention)
    before, expected = parameters(model), expected_parameters(model, ROWS)
    collator = PearCollator(PAD, padding_free=padding_free)
    Trainer(attach(model), arguments(tmp_path), data_collator=collator, train_dataset=exported).train()
    assert largest_difference(parameters(model), before) > 0.1, "the step must be large enough to test"
    assert largest_difference(parameters(model), expected) <= TOLERANCE


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding_free"])
def test_a_padded_length_changes_nothing(
    tiny: PreTrainedModel, padding_free: bool, exported: datasets.Dataset, tmp_path: Path
) -> None:
    expected = expected_parameters(tiny, ROWS)
    collator = PearCollator(PAD, padding_free=padding_free, pad_to_multiple_of=16)
    Trainer(attach(tiny), arguments(tmp_path), data_collator=collator, train_dataset=exported).train()
    assert largest_difference(parameters(tiny), expected) <= TOLERANCE


def test_a_model_not_attached_and_weights_of_one_train_as_ever(
    exported: datasets.Dataset, tmp_path: Path
) -> None:
    """Three times the plain Trainer: its own collation, ours on a model not attached, and an attached one."""

    def trained(model: PreTrainedModel, rows: Any, collator: Any) -> dict[str, Tensor]:
        Trainer(model, arguments(tmp_path), data_collator=collator, train_dataset=rows).train()
        return parameters(model)

    def plain_collator(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: column for name, column in PearCollator(PAD)(rows).items() if name != "loss_weights"}

    ones = [{**row, "loss_weights": [float(label != -100) for label in row["labels"]]} for row in ROWS]
    plain = trained(make_model("qwen2"), exported, plain_collator)
    ignored = trained(make_model("qwen2"), exported, PearCollator(PAD))
    weighted_by_one = trained(attach(make_model("qwen2")), ones, PearCollator(PAD))
    assert largest_difference(ignored, plain) == 0.0
    assert largest_difference(weighted_by_one, plain) <= 1e-7
    assert largest_difference(plain, expected_parameters(make_model("qwen2"), ones)) <= TOLERANCE


def test_a_plain_loop_with_weighted_nll(tiny: PreTrainedModel, exported: datasets.Dataset) -> None:
    expected = expected_parameters(tiny, ROWS)
    optimizer = torch.optim.SGD(tiny.parameters(), lr=1.0)
    for batch in DataLoader(exported, batch_size=4, collate_fn=PearCollator(PAD)):
        logits = tiny(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        scored = batch["labels"][:, 1:] != -100
        weighted_nll(logprobs, batch["loss_weights"][:, 1:], scored, denom=NUM_SCORED).backward()
    optimizer.step()
    assert largest_difference(parameters(tiny), expected) <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_a_flattened_row_attends_to_itself_alone(name: str) -> None:
    """In a loop of one's own too, where no Trainer has switched the cache off."""
    model = attach(make_model(name))
    batch = PearCollator(PAD, padding_free=True)(ROWS[:5])
    with torch.no_grad():
        flat = model(**batch).logits[0]
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in ROWS[:5]]
    torch.testing.assert_close(flat, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding_free"])
def test_evaluate(
    tiny: PreTrainedModel, padding_free: bool, exported: datasets.Dataset, tmp_path: Path
) -> None:
    """Weighted where the batch has weights; plain, without a warning, where a collator leaves them out."""
    collator = PearCollator(PAD, padding_free=padding_free)
    args = arguments(tmp_path, per_device_eval_batch_size=len(ROWS), prediction_loss_only=True)
    trainer = Trainer(attach(tiny), args, data_collator=collator, eval_dataset=exported)
    with torch.no_grad():
        expected = float(weighted_loss(copy.deepcopy(tiny).double(), ROWS))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=TOLERANCE)
    trainer.data_collator = lambda rows: {k: v for k, v in collator(rows).items() if k != "loss_weights"}
    ones = [{**row, "loss_weights": [1.0] * len(row["labels"])} for row in ROWS]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="this training step is unweighted")
        expected = float(weighted_loss(copy.deepcopy(tiny).double(), ones))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=TOLERANCE)


def test_resuming_from_a_checkpoint_keeps_the_weights(exported: datasets.Dataset, tmp_path: Path) -> None:
    def trainer(**changes: Any) -> Trainer:
        args = arguments(tmp_path, learning_rate=0.1, gradient_accumulation_steps=2, max_steps=2, **changes)
        return Trainer(
            attach(make_model("qwen2")), args, data_collator=PearCollator(PAD), train_dataset=exported
        )

    straight = trainer(save_strategy="steps", save_steps=1)
    straight.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "trained" / "checkpoint-1"))
    assert resumed.state.global_step == 2
    assert largest_difference(parameters(resumed.model), parameters(straight.model)) == 0.0


def test_a_column_the_trainer_removed_is_missed(
    tiny: PreTrainedModel, exported: datasets.Dataset, tmp_path: Path
) -> None:
    args = arguments(tmp_path, remove_unused_columns=True)
    trainer = Trainer(attach(tiny), args, data_collator=PearCollator(PAD), train_dataset=exported)
    with pytest.raises(ValueError, match=r"has no loss_weights: .*remove_unused_columns=False"):
        trainer.train()


@pytest.mark.parametrize("bypass", ["label_smoothing_factor", "compute_loss_func"])
def test_settings_that_bypass_the_loss_are_refused(
    bypass: str, tiny: PreTrainedModel, exported: datasets.Dataset, tmp_path: Path
) -> None:
    smoothing = {"label_smoothing_factor": 0.1} if bypass == "label_smoothing_factor" else {}
    own_loss = (
        {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()} if not smoothing else {}
    )
    trainer = Trainer(
        attach(tiny),
        arguments(tmp_path, **smoothing),
        data_collator=PearCollator(PAD),
        train_dataset=exported,
        **own_loss,
    )
    with pytest.raises(RuntimeError, match="the loss was computed without them: switch off"):
        trainer.train()


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding_free"])
def test_a_streamed_export(
    tiny: PreTrainedModel, padding_free: bool, exported: datasets.Dataset, tmp_path: Path
) -> None:
    expected = expected_parameters(tiny, ROWS)
    args = arguments(tmp_path, accelerator_config={"dispatch_batches": False})
    collator = PearCollator(PAD, padding_free=padding_free)
    Trainer(attach(tiny), args, data_collator=collator, train_dataset=exported.to_iterable_dataset()).train()
    assert largest_difference(parameters(tiny), expected) <= TOLERANCE
