"""An export trained by TRL's real SFTTrainer: one SGD step against sum(w * nll) / N worked out in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import SFTConfig, SFTTrainer
from two_ranks import run_on_two_ranks

from pear_data import importance_weights
from pear_data.demo import asset
from pear_data.hooks.trl import make_sft_trainer
from pear_data.loss.live import LivePear
from pear_data.schema import EXPORT_HF

PAGE = Path(__file__).parents[2] / "pear_data" / "hooks" / "trl.md"
TOLERANCE = 2e-6
VOCAB = 416
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
MOE: dict[str, Any] = {
    "experts_implementation": "eager",
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, **MOE, router_aux_loss_coef=0.5)),
}
PADDED: dict[str, Any] = {}
PADDING_FREE: dict[str, Any] = {"padding_free": True, "max_length": None}
PACKING: dict[str, Any] = {"packing": True, "max_length": 48, "gradient_accumulation_steps": 1}
MODES = {"padded": PADDED, "padding_free": PADDING_FREE, "packing": PACKING}


def make_rows(count: int = 16) -> list[dict[str, Any]]:
    """Ragged rows of 4 to 40 tokens, some of two turns; weights from 0 to 3, a tenth 0, a twentieth negative."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for i in range(count):
        length = int(torch.randint(4, 41, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        scored = torch.arange(length) >= int(torch.randint(1, length, (), generator=generator))
        if length > 20:
            scored[5:9] = True
        chance = torch.rand(length, generator=generator)
        weights = 3 * torch.rand(length, generator=generator)
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
DENOMINATORS = {
    "tokens": sum(label != -100 for row in ROWS for label in row["labels"]),
    "weights": sum(weight for row in ROWS for weight in row["loss_weights"]),
    "sequences": len(ROWS),
}
ONES = [{**row, "loss_weights": [float(label != -100) for label in row["labels"]]} for row in ROWS]


def packed(rows: list[dict[str, Any]], per_pack: int) -> list[dict[str, Any]]:
    """The rows laid end to end, as `hf-packed` holds them."""
    packs = []
    for group in (rows[i : i + per_pack] for i in range(0, len(rows), per_pack)):
        pack = {
            name: [value for row in group for value in row[name]]
            for name in ("input_ids", "labels", "loss_weights")
        }
        pack["position_ids"] = [t for row in group for t in range(len(row["labels"]))]
        pack["seq_lengths"] = [len(row["labels"]) for row in group]
        packs.append({**pack, "sample_ids": [row["sample_id"] for row in group]})
    return packs


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(asset("initial"))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as an export holds them."""
    folder = tmp_path_factory.mktemp("export")
    pq.write_table(pa.Table.from_pylist(ROWS, EXPORT_HF), folder / "train-00000.parquet")
    return folder


@pytest.fixture(scope="module")
def exported(export: Path, tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    return datasets.load_dataset(str(export), split="train", cache_dir=str(tmp_path_factory.mktemp("cache")))


def make_model(name: str = "qwen2") -> PreTrainedModel:
    torch.manual_seed(3)
    return MODELS[name]()


ONE_STEP: dict[str, Any] = {
    "train_sampling_strategy": "sequential",
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def config(tmp_path: Path, **changes: Any) -> SFTConfig:
    """One optimizer step of SGD with lr 1 over all rows in order: two micro-batches of eight."""
    batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    return SFTConfig(**{"output_dir": str(tmp_path / "trained"), **batches, **ONE_STEP, **changes})


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


def balancing_loss(model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """Mixtral's load-balancing loss of one micro-batch: experts * sum of (share of tokens * mean probability)."""
    config = model.config
    routed = [
        torch.cat(layers)
        for layers in zip(
            *(
                model(input_ids=torch.tensor([row["input_ids"]]), output_router_logits=True).router_logits
                for row in rows
            ),
            strict=True,
        )
    ]
    probs = torch.cat(routed).softmax(-1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(config.num_experts_per_tok).indices, 1.0)
    return config.num_experts * (chosen.mean(0) * probs.mean(0)).sum()


def expected_parameters(
    model: PreTrainedModel,
    rows: list[dict[str, Any]],
    micro_batches: int = 2,
    denominator: float = DENOMINATORS["tokens"],
) -> dict[str, Tensor]:
    """The parameters after one SGD step of lr 1, in float64."""
    exact = copy.deepcopy(model).double().train()
    loss = weighted_loss(exact, rows) * (DENOMINATORS["tokens"] / denominator)
    if hasattr(exact.config, "num_experts"):
        size = len(rows) // micro_batches
        parts = [balancing_loss(exact, rows[i : i + size]) for i in range(0, len(rows), size)]
        loss = loss + exact.config.router_aux_loss_coef * torch.stack(parts).mean()
    loss.backward()
    return {
        name: value.detach() - (0 if value.grad is None else value.grad)
        for name, value in exact.named_parameters()
    }


def test_the_page(export: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, but for the model, the folder and the optimizer."""
    model = make_model()
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    (tmp_path / "weighted").symlink_to(export)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    code = PAGE.read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"ONE_STEP": ONE_STEP}
    exec(
        code.replace("Qwen/Qwen2.5-7B-Instruct", "policy").replace("learning_rate=1e-5", "**ONE_STEP"), names
    )
    after = parameters(names["trainer"].model)
    assert largest_difference(after, expected_parameters(model, ROWS)) <= TOLERANCE


@pytest.mark.parametrize("fused_head", [True, False], ids=["trl_head", "full_head"])
@pytest.mark.parametrize("mode", ["padded", "padding_free"])
@pytest.mark.parametrize("name", MODELS)
def test_one_step_is_the_formula(
    name: str, mode: str, fused_head: bool, exported: datasets.Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(name)
    before, expected = parameters(model), expected_parameters(model, ROWS)
    make_sft_trainer(
        model, config(tmp_path, **MODES[mode]), exported, processing_class=tokenizer, fused_head=fused_head
    ).train()
    assert largest_difference(parameters(model), before) > 0.1, "the step must be large enough to test"
    assert largest_difference(parameters(model), expected) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normaliser", ["weights", "sequences", 100.0])
def test_other_denominators(
    normaliser: Any, mode: str, exported: datasets.Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model()
    denominator = DENOMINATORS.get(normaliser, normaliser)
    expected = expected_parameters(model, ROWS, denominator=10 * denominator)
    args = config(tmp_path, **MODES[mode], learning_rate=0.1)
    make_sft_trainer(model, args, exported, processing_class=tokenizer, normaliser=normaliser).train()
    assert largest_difference(parameters(model), expected) <= TOLERANCE


def test_packs_of_our_own_export(tokenizer: Any, tmp_path: Path) -> None:
    model = make_model()
    expected = expected_parameters(model, ROWS)
    args = config(tmp_path, **PADDING_FREE, per_device_train_batch_size=2)
    packs = datasets.Dataset.from_list(packed(ROWS, 4))
    make_sft_trainer(model, args, packs, processing_class=tokenizer).train()
    assert largest_difference(parameters(model), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe"])
def test_packs_of_trl(name: str, exported: datasets.Dataset, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(name)
    expected = expected_parameters(model, ROWS, micro_batches=1)
    trainer = make_sft_trainer(model, config(tmp_path, **PACKING), exported, processing_class=tokenizer)
    packs = trainer.train_dataset
    assert 4 <= len(packs) <= 8
    assert max(map(sum, packs["seq_lengths"])) <= 48
    assert sum(map(len, packs["seq_lengths"])) == len(ROWS)
    trainer.train()
    assert largest_difference(parameters(model), expected) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_a_streamed_export(mode: str, export: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model()
    expected = expected_parameters(model, ROWS)
    stream = datasets.load_dataset(str(export), split="train", streaming=True, cache_dir=str(tmp_path))
    args = config(tmp_path, **MODES[mode])
    make_sft_trainer(model, args, stream, processing_class=tokenizer).train()
    assert largest_difference(parameters(model), expected) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe"])
def test_weights_of_one_are_plain_trl(name: str, mode: str, tokenizer: Any, tmp_path: Path) -> None:
    """Parameters, loss and every metric; what a weight does not touch stays equal with other weights too."""

    def trained(make: Callable[..., SFTTrainer], rows: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        model = make_model(name)
        trainer = make(model, config(tmp_path, **MODES[mode]), train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return parameters(model), trainer.state.log_history[0]

    columns = {"input_ids", "labels"}
    plain, metrics = trained(
        SFTTrainer, datasets.Dataset.from_list([{name: row[name] for name in columns} for row in ROWS])
    )
    weighted_by_one, metrics_of_one = trained(make_sft_trainer, datasets.Dataset.from_list(ONES))
    _, metrics_weighted = trained(make_sft_trainer, datasets.Dataset.from_list(ROWS))
    untouched = {"entropy", "mean_token_accuracy", "num_tokens"} | ({"aux_loss"} if "moe" in name else set())
    assert untouched | {"loss", "grad_norm"} <= set(metrics)
    assert largest_difference(weighted_by_one, plain) <= 1e-7
    assert metrics_of_one == pytest.approx(metrics, rel=1e-6)
    assert set(metrics_weighted) == set(metrics)
    assert {key: metrics_weighted[key] for key in untouched} == pytest.approx(
        {key: metrics[key] for key in untouched}, rel=1e-6
    )
    assert metrics_weighted["loss"] != pytest.approx(metrics["loss"], rel=0.01)


@pytest.mark.parametrize("mode", ["padded", "padding_free"])
def test_evaluation(mode: str, exported: datasets.Dataset, tokenizer: Any, tmp_path: Path) -> None:
    """Weighted where the rows have weights, TRL's own where they have none."""
    model = make_model()
    args = config(tmp_path, per_device_eval_batch_size=len(ROWS), **MODES[mode])
    both = {
        "weighted": exported,
        "plain": exported.remove_columns("loss_weights"),
        "streamed": exported.to_iterable_dataset(),
    }
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        weighted, plain = float(weighted_loss(exact, ROWS)), float(weighted_loss(exact, ONES))
    trainer = make_sft_trainer(model, args, exported, both, processing_class=tokenizer)
    found = trainer.evaluate()
    assert found["eval_weighted_loss"] == pytest.approx(weighted, abs=TOLERANCE)
    assert found["eval_streamed_loss"] == pytest.approx(weighted, abs=TOLERANCE)
    assert found["eval_plain_loss"] == pytest.approx(plain, abs=TOLERANCE)
    assert trainer.evaluate(both["plain"])["eval_loss"] == pytest.approx(plain, abs=TOLERANCE)


def test_metrics_that_a_user_computes_see_the_logits(
    exported: datasets.Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    args = config(tmp_path, per_device_eval_batch_size=len(ROWS))
    trainer = make_sft_trainer(
        make_model(),
        args,
        exported,
        exported,
        processing_class=tokenizer,
        compute_metrics=lambda prediction: {"vocabulary": float(prediction.predictions.shape[-1])},
    )
    assert trainer.evaluate()["eval_vocabulary"] == VOCAB


def with_live_columns(model: PreTrainedModel, level: str) -> list[dict[str, Any]]:
    """The rows with a made-up behavior policy's log-probs, and the weights that `pear-data weight` makes of them."""
    generator = torch.Generator().manual_seed(7)
    exact = copy.deepcopy(model).double().eval()
    rows = []
    for row in ROWS:
        ids = torch.tensor(row["input_ids"])
        scored = torch.tensor(row["labels"]) != -100
        with torch.no_grad():
            logits = exact(input_ids=ids[None], use_cache=False).logits[0]
        target = torch.zeros(len(ids), dtype=torch.float64)
        target[1:] = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        behavior = target - 0.2 * torch.randn(len(ids), generator=generator) + 0.1
        weights = torch.zeros(len(ids))
        weights[scored] = torch.from_numpy(
            importance_weights(
                target[scored].numpy(), behavior[scored].float().numpy(), [int(scored.sum())], level=level
            )
        )
        columns = {"loss_weights": weights, "behavior_logprobs": (behavior * scored).float()}
        rows.append({**row, **{name: column.tolist() for name, column in columns.items()}})
    return rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_live_weights_of_the_initial_policy_are_the_frozen_ones(
    level: Any, mode: str, tokenizer: Any, tmp_path: Path
) -> None:
    """Frozen weights stand in `loss_weights` for the reference; live ones do not look at them."""

    def trained(rows: list[dict[str, Any]], **live: Any) -> dict[str, Tensor]:
        model = make_model()
        data = datasets.Dataset.from_list(rows)
        args = config(tmp_path, **MODES[mode])
        make_sft_trainer(model, args, data, processing_class=tokenizer, **live).train()
        return parameters(model)

    frozen = with_live_columns(make_model(), level)
    spread = [weight for row in frozen for weight in row["loss_weights"] if weight]
    assert max(spread) > 1.1 * min(spread)
    live = [{**row, "loss_weights": ONES[i]["loss_weights"]} for i, row in enumerate(frozen)]
    after = trained(live, live=LivePear(level=level))
    assert largest_difference(after, expected_parameters(make_model(), frozen)) <= TOLERANCE
    assert largest_difference(after, trained(frozen)) <= 1e-6
    assert largest_difference(after, trained(live)) > 1e-3


def test_live_weights_without_behavior_logprobs_are_refused(
    exported: datasets.Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the train dataset has no behavior_logprobs"):
        make_sft_trainer(
            make_model(), config(tmp_path), exported, processing_class=tokenizer, live=LivePear()
        )


def test_live_weights_of_negative_samples(tokenizer: Any, tmp_path: Path) -> None:
    """-lambda times the sequence-level weight, told from the sign of the frozen weights."""
    model = make_model()
    frozen, sequence = with_live_columns(model, "block"), with_live_columns(model, "sequence")
    for i in (0, 5, 11):
        frozen[i]["loss_weights"] = [-0.5 * weight for weight in sequence[i]["loss_weights"]]
    expected = expected_parameters(model, frozen)
    live = [
        {**row, "loss_weights": [float(w > 0) - float(w < 0) for w in row["loss_weights"]]} for row in frozen
    ]
    make_sft_trainer(
        model,
        config(tmp_path, **PADDING_FREE),
        datasets.Dataset.from_list(live),
        processing_class=tokenizer,
        live=LivePear(negative_scale=0.5),
    ).train()
    assert largest_difference(parameters(model), expected) <= TOLERANCE


TWO_PROCESSES = """
import pathlib, sys, torch, datasets, test_trl
from transformers import AutoTokenizer
from pear_data.demo import asset
from pear_data.hooks.trl import make_sft_trainer
folder = pathlib.Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(asset("initial"))
for mode, normaliser in test_trl.ON_TWO_PROCESSES:
    model = test_trl.make_model("qwen2")
    args = test_trl.config(folder, **test_trl.MODES[mode], per_device_train_batch_size=4)
    rows = datasets.Dataset.from_list(test_trl.ROWS)
    trainer = make_sft_trainer(model, args, rows, processing_class=tokenizer, normaliser=normaliser)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(test_trl.parameters(model), folder / f"{mode}-{normaliser}.pt")
"""
ON_TWO_PROCESSES = [("padded", "tokens"), ("padding_free", "tokens"), ("padding_free", "weights")]


def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    run_on_two_ranks(script, tmp_path)
    for mode, normaliser in ON_TWO_PROCESSES:
        expected = expected_parameters(make_model(), ROWS, denominator=DENOMINATORS[normaliser])
        after = torch.load(tmp_path / f"{mode}-{normaliser}.pt")
        assert largest_difference(after, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("settings", "arguments", "complaint"),
    [
        ({"assistant_only_loss": True}, {}, r"assistant_only_loss=True.*the export's labels"),
        ({"completion_only_loss": True}, {}, r"completion_only_loss=True.*the export's labels"),
        ({"loss_type": "dft"}, {}, r"loss_type='dft'.*--level dft"),
        ({"label_smoothing_factor": 0.1}, {}, r"label_smoothing_factor=0.1.*one token"),
        ({"packing": True, "packing_strategy": "wrapped"}, {}, r"packing_strategy='wrapped'.*cuts samples"),
        ({"average_tokens_across_devices": False}, {}, "each rank would divide by its own labels"),
        ({"packing": True, "max_length": None}, {}, "needs max_length"),
        ({}, {"data_collator": list}, "takes no data_collator"),
        ({}, {"compute_loss_func": print}, "takes no compute_loss_func"),
        ({}, {"normaliser": "weights", "live": LivePear()}, "take another normaliser than weights"),
        ({}, {"formatting_func": str}, "takes no formatting_func"),
        ({"max_length": 30}, {}, "a row of 40 tokens and max_length is 30"),
        ({"max_length": 30, "packing": True}, {}, "a row of 40 tokens and max_length is 30"),
    ],
)
def test_what_would_lose_the_weights_is_refused(
    settings: dict[str, Any],
    arguments: dict[str, Any],
    complaint: str,
    exported: datasets.Dataset,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_sft_trainer(
            make_model(), config(tmp_path, **settings), exported, processing_class=tokenizer, **arguments
        )


def test_a_stream_with_a_longer_row_is_refused_when_it_comes(
    exported: datasets.Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    args = config(tmp_path, max_length=30)
    trainer = make_sft_trainer(make_model(), args, exported.to_iterable_dataset(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="a row of 40 tokens and max_length is 30"):
        trainer.train()


def test_a_dataset_without_weights_is_refused(
    exported: datasets.Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    plain = exported.remove_columns("loss_weights")
    with pytest.raises(ValueError, match="the train dataset has no loss_weights"):
        make_sft_trainer(make_model(), config(tmp_path), plain, processing_class=tokenizer)
    unprepared = config(tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = make_sft_trainer(make_model(), unprepared, plain, processing_class=tokenizer)
    with pytest.raises(ValueError, match="a training batch has no loss_weights"):
        trainer.train()


@pytest.mark.parametrize("settings", [PADDED, {"packing": True}], ids=["padded", "packing"])
def test_packs_that_would_attend_across_samples_are_refused(
    settings: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    packs = datasets.Dataset.from_list(packed(ROWS, 4))
    with pytest.raises(ValueError, match="packed already.*padding_free=True"):
        make_sft_trainer(make_model(), config(tmp_path, **settings), packs, processing_class=tokenizer)
