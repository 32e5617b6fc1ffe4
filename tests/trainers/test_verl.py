"""verl's real SFT trainer on an export, in an environment of its own: one SGD step against sum(w nll) / sum(w)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from one_step import largest_difference, parameters_after, parameters_in, stored_samples
from own_environment import Environments, OwnEnvironment
from pages import blocks, words

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.demo import asset

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "verl_on_cpu.py"
TOLERANCE = 2e-6
REQUIREMENTS = [
    "verl==0.9.1",
    "transformers==5.10.4",
    "tokenizers==0.22.2",
    "huggingface_hub==1.33.0",
    "tensordict==0.10.0",
    "torchdata==0.11.0",
    "peft==0.21.2",
    "trl==0.29.1",
    "hydra-core==1.3.8",
    "omegaconf==2.3.1",
    "antlr4-python3-runtime==4.9.3",
    "codetiming==1.4.0",
    "orjson==3.13.0",
    "pyvers==0.1.0",
]
ONE_STEP = [
    f"model.path={asset('initial')}",
    "model.enable_gradient_checkpointing=False",
    "+model.override_config.attn_implementation=sdpa",
    "engine.use_torch_compile=False",
    *(f"+engine.mixed_precision.{kind}_dtype=fp32" for kind in ("param", "reduce", "buffer")),
    "data.train_batch_size=16",
    "data.use_dynamic_bsz=False",
    "data.micro_batch_size_per_gpu=4",
    "data.num_workers=0",
    "optim.optimizer=SGD",
    "optim.lr=1.0",
    "optim.weight_decay=0",
    "optim.clip_grad=1e9",
    "trainer.device=cpu",
    "trainer.total_training_steps=1",
    "trainer.default_local_dir=trained",
    "trainer.resume_mode=disable",
    "checkpoint.save_contents=[hf_model]",
]


@pytest.fixture(scope="module")
def verl(environments: Environments) -> OwnEnvironment:
    return environments("verl", REQUIREMENTS)


@pytest.fixture
def exported(weighted_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's export in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEAR_STORE", str(weighted_store))
    (export,) = blocks("verl")
    assert run(words(export)[1:]) == 0
    return tmp_path


def train(verl: OwnEnvironment, folder: Path, ranks: int, overrides: Sequence[str]) -> str:
    """The page's command with a model and settings for one step on CPUs."""
    (text,) = blocks("verl", "bash")
    shell = words(text)
    settings = shell[shell.index("verl.trainer.sft_trainer") + 1 :]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(SCRIPT)]
    return verl.python(*launch, *settings, *ONE_STEP, *overrides, cwd=folder, VERL_PLATFORM="cpu")


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["model.use_remove_padding=False"]),
        (2, []),
        (1, ["data.use_dynamic_bsz=True", "data.max_token_len_per_gpu=700"]),
    ],
    ids=["padded", "packed-on-two-ranks", "dynamic"],
)
def test_the_page(
    verl: OwnEnvironment, weighted_store: Path, exported: Path, ranks: int, overrides: list[str]
) -> None:
    output = train(verl, exported, ranks, overrides)
    samples = stored_samples(open_store(weighted_store), "block")
    mass = sum(sample.mass for sample in samples)
    expected = parameters_after(asset("initial"), [(sample, 1 / mass) for sample in samples])
    trained = parameters_in(exported / "trained")
    assert largest_difference(trained, parameters_in(asset("initial"))) > 0.01, "large enough to test"
    assert largest_difference(trained, expected) <= TOLERANCE
    assert f"train/global_tokens:{sum(len(sample.ids) for sample in samples)}" in output


LOADED = """
import json, sys
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from verl.trainer.sft_trainer import create_sft_dataset
from verl.utils.dataset.dataset_utils import SFTTensorCollator

answers = []
for files, max_samples, settings in json.loads(sys.argv[1]):
    names = {"custom_cls": {"path": "pkg://pear_data.hooks.verl", "name": "PearVerlDataset"}}
    config = OmegaConf.create(names | {"pad_mode": "no_padding"} | settings)
    try:
        dataset = create_sft_dataset(OmegaConf.create(files), config, None, None, max_samples=max_samples)
        batches = list(DataLoader(dataset, 8, collate_fn=SFTTensorCollator("no_padding"), num_workers=2))
        rows = {name: [row.tolist() for batch in batches for row in batch[name].unbind()] for name in batches[0]}
        answers.append([rows, {name: str(column.dtype) for name, column in batches[0].items()}])
    except ValueError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def load(verl: OwnEnvironment, folder: Path, *cases: tuple[list[str], int, dict[str, Any]]) -> list[Any]:
    """For files, max_samples and settings: the rows and types of verl's batches, or the error."""
    return json.loads(verl.python("-c", LOADED, json.dumps(cases), cwd=folder).splitlines()[-1])


def test_batches_hold_the_weights(verl: OwnEnvironment, weighted_store: Path, exported: Path) -> None:
    samples = stored_samples(open_store(weighted_store), "block")
    file = str(exported / "weighted" / "train-00000.parquet")
    whole, cut = load(
        verl,
        exported,
        (["weighted/train-*.parquet"], -1, {}),
        ([file, file], 17, {"truncation": "right", "max_length": 100}),
    )
    rows, types = whole
    assert types == {"input_ids": "torch.int64", "position_ids": "torch.int64", "loss_mask": "torch.float32"}
    assert rows["input_ids"] == [sample.ids for sample in samples]
    assert rows["loss_mask"] == [sample.weights for sample in samples]
    assert rows["position_ids"] == [list(range(len(sample.ids))) for sample in samples]
    assert cut[0]["input_ids"] == [sample.ids[:100] for sample in [*samples, samples[0]]]
    assert cut[0]["loss_mask"] == [sample.weights[:100] for sample in [*samples, samples[0]]]


def test_what_would_lose_weights_is_refused(
    verl: OwnEnvironment, weighted_store: Path, exported: Path
) -> None:
    assert run(["export", "hf", "--format", "hf"]) == 0
    files = ["weighted/train-00000.parquet"]
    longest = max(len(sample.ids) for sample in stored_samples(open_store(weighted_store), "block"))
    padded, left, too_long, other_format = load(
        verl,
        exported,
        (files, -1, {"pad_mode": "right"}),
        (files, -1, {"truncation": "left"}),
        (files, -1, {"max_length": longest - 1}),
        (["hf/train-00000.parquet"], -1, {}),
    )
    assert padded.endswith(": set data.pad_mode=no_padding")
    assert left.endswith(": set data.truncation=error or right")
    assert f"has {longest} tokens and data.max_length is {longest - 1}: " in too_long
    assert other_format.endswith("train on what `pear-data export --format verl` wrote")
