"""DDP and FSDP2 on two CPU processes: one SGD step against sum(w * nll) / denominator in one process, in float64.

Two ranks with unlike rows, two micro-batches each, denominators summed over both. Live weights are those of the initial
policy, from `importance_weights`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from two_ranks import run_on_two_ranks

from pear_data import importance_weights
from pear_data.loss import LivePear, PearCollator, attach, denominator

TOLERANCE = 2e-6
TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
# name: tied head or not, how it is sharded, attached before or after that, fused, live level, normaliser
CASES: dict[str, dict[str, Any]] = {
    "ddp-fused-frozen-tokens": {"wrap": "ddp", "fused": True},
    "ddp-logits-frozen-weights": {"wrap": "ddp", "normaliser": "weights", "attach_first": False},
    "ddp-fused-live-sequences": {"wrap": "ddp", "fused": True, "live": "block", "normaliser": "sequences"},
    "ddp-logits-live-tokens": {"wrap": "ddp", "live": "sequence"},
    "ddp-fused-frozen-number": {"wrap": "ddp", "fused": True, "normaliser": 7.0, "attach_first": False},
    "fsdp-fused-frozen-weights": {"wrap": "fsdp", "fused": True, "normaliser": "weights"},
    "fsdp-logits-live-sequences": {"wrap": "fsdp", "live": "token", "normaliser": "sequences"},
    "fsdp-fused-live-tokens": {"wrap": "fsdp", "fused": True, "live": "block", "attach_first": False},
    "fsdp-logits-frozen-number": {"wrap": "fsdp", "normaliser": 7.0},
    "fsdp-untied-fused-live-tokens": {"wrap": "fsdp", "tied": False, "fused": True, "live": "sequence"},
    "fsdp-own-head-fused-frozen": {"wrap": "fsdp head", "tied": False, "fused": True},
    "fsdp-own-head-fused-live": {
        "wrap": "fsdp head",
        "tied": False,
        "fused": True,
        "live": "sequence",
        "normaliser": "sequences",
        "attach_first": False,
    },
}
OPTIONS: dict[str, Any] = {
    "tied": True,
    "fused": False,
    "live": None,
    "normaliser": "tokens",
    "attach_first": True,
}


def learning_rate(case: dict[str, Any]) -> float:
    """Steps of one size: float32 has no more digits for larger ones."""
    return 1.0 if case["normaliser"] in ("tokens", "weights") else 0.1


def make_model(tied: bool) -> PreTrainedModel:
    torch.manual_seed(3)
    if tied:
        return Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**TINY))


def logprobs_of(model: PreTrainedModel, row: dict[str, Any]) -> Tensor:
    """[L], of each token given those before it; 0 for the first."""
    ids = torch.tensor(row["input_ids"])
    found = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return torch.cat([found.new_zeros(1), found.gather(1, ids[1:, None])[:, 0]])


def make_rows(tied: bool, level: Any) -> list[dict[str, Any]]:
    """Eight ragged rows; `loss_weights` drawn, or for a live level what it makes of the initial policy."""
    generator = torch.Generator().manual_seed(5)
    exact = make_model(tied).double().eval()
    rows = []
    for length in (5, 17, 9, 30, 12, 4, 21, 8):
        ids = torch.randint(0, 101, (length,), generator=generator)
        scored = torch.arange(length) >= 3
        row = {"input_ids": ids.tolist(), "labels": torch.where(scored, ids, -100).tolist()}
        with torch.no_grad():
            target = logprobs_of(exact, row)
        behavior = (target - 0.2 * torch.randn(length, generator=generator) + 0.1).float() * scored
        weights = 3 * torch.rand(length, generator=generator) * scored
        if level is not None:
            found = importance_weights(
                target[scored].numpy(), behavior[scored].double().numpy(), [int(scored.sum())], level=level
            )
            weights[scored] = torch.from_numpy(found)
        rows.append(row | {"loss_weights": weights.tolist(), "behavior_logprobs": behavior.tolist()})
    return rows


def expected_parameters(case: dict[str, Any]) -> dict[str, Tensor]:
    rows = make_rows(case["tied"], case["live"])
    divisor = {
        "tokens": sum(label != -100 for row in rows for label in row["labels"]),
        "weights": sum(weight for row in rows for weight in row["loss_weights"]),
        "sequences": len(rows),
    }.get(case["normaliser"], case["normaliser"])
    model = make_model(case["tied"]).double()
    for row in rows:
        weights = torch.tensor(row["loss_weights"], dtype=torch.float64)
        (-(weights * logprobs_of(model, row)).sum() * learning_rate(case) / divisor).backward()
    return {name: (p - p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}


def wrapped(model: PreTrainedModel, wrap: str) -> Any:
    if wrap == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if wrap == "fsdp head":
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def one_step(case: dict[str, Any]) -> dict[str, Tensor]:
    """On this rank: its half of the rows in two micro-batches, packed where weights are live."""
    rank, normaliser = torch.distributed.get_rank(), case["normaliser"]
    settings: dict[str, Any] = {"fused": case["fused"]}
    rows = make_rows(case["tied"], case["live"])
    if case["live"] is not None:
        settings["live"] = LivePear(level=case["live"])
        rows = [row | {"loss_weights": [float(w != 0) for w in row["loss_weights"]]} for row in rows]
    model = make_model(case["tied"])
    if case["attach_first"]:
        model = wrapped(attach(model, **settings), case["wrap"])
    else:
        model = attach(wrapped(model, case["wrap"]), **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate(case))
    own = [rows[:3], rows[3:4]] if rank == 0 else [rows[4:6], rows[6:]]
    collate = PearCollator(0, padding_free=case["live"] is not None)
    batches = [collate(part) for part in own]
    divisor: Any = normaliser
    if isinstance(normaliser, str):
        divisor = torch.stack([denominator(batch, normaliser) for batch in batches]).sum()
        torch.distributed.all_reduce(divisor)
    for batch in batches:
        # Both take the mean over ranks.
        (2 * model(**batch, loss_denominator=divisor).loss).backward()
    optimizer.step()
    unwrapped = model.module if case["wrap"] == "ddp" else model
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
        for name, p in unwrapped.named_parameters()
    }


def on_each_rank(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    for name, case in CASES.items():
        after = one_step(OPTIONS | case)
        if torch.distributed.get_rank() == 0:
            torch.save(after, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parameters of every case, from one start of two processes."""
    folder = tmp_path_factory.mktemp("data_parallel")
    run_on_two_ranks(__file__, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_one_step_of_two_ranks_is_the_formula(name: str, trained: Path) -> None:
    case = OPTIONS | CASES[name]
    before = {one: p.detach() for one, p in make_model(case["tied"]).named_parameters()}
    after, expected = torch.load(trained / f"{name}.pt"), expected_parameters(case)
    assert after.keys() == expected.keys()
    assert max(float((after[one] - before[one]).abs().max()) for one in before) > 0.02
    assert max(float((after[one] - expected[one]).abs().max()) for one in expected) <= TOLERANCE


if __name__ == "__main__":
    on_each_rank(Path(sys.argv[1]))
