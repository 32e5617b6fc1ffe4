"""What the commands export, through the real Trainer: one SGD step against sum(w nll) / N from the stored weights."""

from __future__ import annotations

import datasets
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.demo import asset
from pear_data.loss import PearCollator, attach

ROWS = 16


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    store = ["--store", str(folder / "store")]
    corpus = [str(asset("corpus")), "--limit", str(ROWS), "--engine", "transformers"]
    assert run(["score", *corpus, "--model", str(asset("initial")), *store]) == 0
    behavior = ["--policy", "behavior", "--model", str(asset("behavior")), "--engine", "transformers"]
    assert run(["score", *behavior, *store]) == 0
    assert run(["weight", "--level", "block", *store]) == 0
    assert run(["export", str(folder / "export"), *store]) == 0
    return folder


def reference_step(store):
    """Parameters after one step of lr 1 on sum(w nll) / N, from the store alone, one unpadded sample at a time."""
    model = AutoModelForCausalLM.from_pretrained(asset("initial"), dtype=torch.float32)
    samples, weights = store.corpus.to_table().to_pylist(), store.weights["block"].to_table().to_pylist()
    total = sum(sample["num_scored"] for sample in samples)
    for sample, weighted in zip(samples, weights, strict=True):
        ids, mask = torch.tensor(sample["input_ids"]), torch.tensor(sample["loss_mask"])
        logprobs = functional.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        (-(logprobs[mask[1:]] * torch.tensor(weighted["weights"])).sum() / total).backward()
    return {name: (p - p.grad).detach() for name, p in model.named_parameters()}, total


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_one_step_moves_the_parameters_as_the_formula_says(job, tmp_path, padding_free):
    want, total = reference_step(open_store(job / "store"))
    dataset = datasets.load_dataset(str(job / "export"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == ROWS
    assert len({len(row) for row in dataset["input_ids"]}) > 8
    assert sum(label != -100 for row in dataset["labels"] for label in row) == total
    model = attach(AutoModelForCausalLM.from_pretrained(asset("initial"), dtype=torch.float32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trained"),
        remove_unused_columns=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = PearCollator(pad_token_id=0, padding_free=padding_free)
    Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator).train()
    after = dict(model.named_parameters())
    moved = max(float((after[name].detach() - before[name]).abs().max()) for name in before)
    difference = max(float((after[name].detach() - want[name]).abs().max()) for name in want)
    print(f"moved up to {moved:.2g}, max difference to the formula {difference:.1e}")
    assert moved > 1e-2
    assert difference <= 2e-6
