"""LLaMA-Factory v1's real SFT training on an export, in an environment of its own, with and without the hook's loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from one_step import Sample, largest_difference, parameters_after, parameters_in
from own_environment import Environments, OwnEnvironment
from pages import blocks, words
from transformers import AutoTokenizer

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.demo import asset

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "llama_factory_with_sgd.py"
TOLERANCE = 2e-6
RATE = (
    0.02  # LLaMA-Factory counts positions from 1, which alone changes float32 gradients by 3e-5 of themselves
)
REQUIREMENTS = [
    "llamafactory==0.9.5",
    "transformers==5.6.0",
    "tokenizers==0.22.2",
    "huggingface_hub==1.33.0",
    "accelerate==1.11.0",
    "datasets==4.0.0",
    "peft==0.18.1",
    "torchdata==0.11.0",
    "omegaconf==2.3.1",
    "antlr4-python3-runtime==4.9.3",
]
ONE_STEP = {
    "model": str(asset("initial")),
    "global_batch_size": 16,
    "max_steps": 1,
    "max_grad_norm": 1e9,
    "bf16": False,
    "batching_workers": 0,
    "enable_activation_checkpointing": False,
    "optim_config": {"name": "sgd", "lr": RATE},
}


@pytest.fixture(scope="module")
def llama_factory(environments: Environments) -> OwnEnvironment:
    return environments("llama-factory", REQUIREMENTS)


@pytest.fixture(scope="module")
def exported(weighted_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's export in it."""
    folder = tmp_path_factory.mktemp("llama-factory")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PEAR_STORE", str(weighted_store))
        (export,) = blocks("llama-factory")
        assert run(words(export)[1:]) == 0
    return folder


@pytest.fixture(scope="module")
def train(llama_factory: OwnEnvironment, exported: Path) -> Callable[..., None]:
    """Trains the page's configuration, changed to one step on a CPU, in one process or on several ranks."""
    (text,) = blocks("llama-factory", "yaml")
    page = yaml.safe_load(text) | ONE_STEP

    def run_jobs(*jobs: tuple[dict[str, Any], bool], ranks: int = 1) -> None:
        (exported / "jobs.json").write_text(
            json.dumps([(page | changes, hooked) for changes, hooked in jobs])
        )
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        llama_factory.python(*(launch if ranks > 1 else []), str(SCRIPT), "jobs.json", cwd=exported)

    return run_jobs


@pytest.fixture(scope="module")
def samples(exported: Path, weighted_store: Path) -> list[Sample]:
    """Conversations as `chatml` renders them, all of an answer with its weight; the ids are those that were scored."""
    tokenizer = AutoTokenizer.from_pretrained(asset("initial"))
    found = []
    for line in (exported / "weighted" / "train-00000.jsonl").read_text().splitlines():
        ids: list[int] = []
        weights: list[float] = []
        for message in json.loads(line)["messages"]:
            (part,) = message["content"]
            tokens = tokenizer.encode(f"<|im_start|>{message['role']}\n{part['value']}<|im_end|>\n")
            ids += tokens
            weights += [message["loss_weight"]] * len(tokens)
        found.append(Sample(ids, weights, sum(weight > 0 for weight in weights)))
    assert [sample.ids for sample in found] == open_store(weighted_store).corpus.to_table()[
        "input_ids"
    ].to_pylist()
    return found


def test_the_page(train: Callable[..., None], exported: Path, samples: list[Sample]) -> None:
    (command,) = blocks("llama-factory", "bash")
    assert words(command)[-3:] == ["-m", "pear_data.hooks.llama_factory", "config.yaml"]
    train(({}, True), ranks=2)
    labels = sum(sample.num_scored for sample in samples)
    expected = parameters_after(asset("initial"), [(sample, RATE / labels) for sample in samples])
    trained = parameters_in(exported / "trained")
    assert largest_difference(trained, parameters_in(asset("initial"))) > 0.05, "large enough to test"
    assert largest_difference(trained, expected) <= TOLERANCE


def test_without_the_hook(train: Callable[..., None], exported: Path, samples: list[Sample]) -> None:
    """sum(w nll) / sum(w) of each micro-batch: one of all samples compares them, one of a sample loses its weight."""
    train(
        ({"micro_batch_size": 16, "output_dir": "whole"}, False),
        ({"micro_batch_size": 1, "output_dir": "single"}, False),
    )
    mass = sum(sample.mass for sample in samples)
    weighted = parameters_after(asset("initial"), [(sample, RATE / mass) for sample in samples])
    assert largest_difference(parameters_in(exported / "whole"), weighted) <= TOLERANCE
    labels = sum(sample.num_scored for sample in samples)
    ones = [replace(sample, weights=[float(weight > 0) for weight in sample.weights]) for sample in samples]
    weightless = parameters_after(asset("initial"), [(sample, RATE / labels) for sample in ones])
    assert largest_difference(parameters_in(exported / "single"), weightless) <= TOLERANCE


REFUSED = """
from types import SimpleNamespace
from pear_data.hooks.llama_factory import PearSFTTrainer
try:
    PearSFTTrainer(SimpleNamespace(dist_config={"name": "fsdp2", "cp_size": 2}))
except ValueError as error:
    print(error)
"""


def test_split_sequences_are_refused(llama_factory: OwnEnvironment, exported: Path) -> None:
    assert "cp_size splits sequences" in llama_factory.python("-c", REFUSED, cwd=exported)
