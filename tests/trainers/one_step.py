"""What a step should do: independent of the library and of every trainer, in float64, one sample at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pear_data.store import Store


@dataclass(frozen=True)
class Sample:
    """`weights[t]` multiplies -log p(ids[t] | ids[<t]); the scored tokens have one."""

    ids: list[int]
    weights: list[float]
    num_scored: int

    @property
    def mass(self) -> float:
        return sum(self.weights)


def stored_samples(store: Store, weighting: str) -> list[Sample]:
    corpus, weights = store.corpus.to_table().to_pylist(), store.weights[weighting].to_table().to_pylist()
    samples = []
    for row, weighted in zip(corpus, weights, strict=True):
        values = iter(weighted["weights"])
        aligned = [next(values) if scored else 0.0 for scored in row["loss_mask"]]
        samples.append(Sample(row["input_ids"], aligned, row["num_scored"]))
    return samples


def parameters_after(policy: Path, terms: Iterable[tuple[Sample, float]]) -> dict[str, Tensor]:
    """The parameters after one SGD step of lr 1 on the sum of factor * sum(w * nll) over `terms`: samples, factors."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64)
    for sample, factor in terms:
        ids = torch.tensor(sample.ids)
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        weights = torch.tensor(sample.weights, dtype=torch.float64)[1:]
        (-(logprobs * weights).sum() * factor).backward()
    return {name: (p - p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}


def parameters_in(folder: Path) -> dict[str, Tensor]:
    """The parameters of the one model below a folder."""
    (file,) = folder.rglob("model.safetensors")
    return load_file(file)


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - expected[name].double()).abs().max()) for name in expected)
