"""ms-swift's real `swift sft` on an export, in an environment of its own: one SGD step against sum(w nll) / N."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from one_step import Sample, largest_difference, parameters_after, parameters_in, stored_samples
from own_environment import Environments, OwnEnvironment
from pages import blocks, words
from torch import Tensor

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.demo import asset
from pear_data.stages.export.swift import FLAGS

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "swift_on_cpu.py"
TOLERANCE = 2e-6
RATE = 0.25  # of which float32 resolves the step to the tolerance: its largest change is 1.06 times the rate
REQUIREMENTS = [
    "ms-swift==4.6.0",
    "trl==0.29.1",
    "datasets==4.8.4",
    "peft==0.20.0",
    "modelscope==1.40.2",
    "modelscope_hub==0.5.1",
    "binpacking==2.0.1",
    "dacite==1.9.2",
    "json_repair==0.64.6",
]
ONE_STEP = f"""
--model {asset("initial")} --model_type qwen2 --template qwen2_5 --check_model false --use_hf true --add_version false
--torch_dtype float32 --attn_impl sdpa --gradient_checkpointing false --dataset_num_proc 1 --dataloader_num_workers 0
--optim sgd --learning_rate {RATE} --lr_scheduler_type constant --warmup_ratio 0 --weight_decay 0 --max_grad_norm 1e9
--max_steps 1 --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --report_to none --save_only_model true
""".split()


@pytest.fixture(scope="module")
def swift(environments: Environments) -> OwnEnvironment:
    return environments("ms-swift", REQUIREMENTS)


@pytest.fixture(scope="module")
def page(weighted_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with the page's export in it, and the page's arguments with a model and settings for one step."""
    folder = tmp_path_factory.mktemp("ms-swift")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PEAR_STORE", str(weighted_store))
        (export,) = blocks("ms-swift")
        assert run(words(export)[1:]) == 0
    (training,) = blocks("ms-swift", "bash")
    command = words(training, folder)
    assert command[:2] == ["swift", "sft"]
    return folder, [*command[2:], *ONE_STEP]


def without(arguments: list[str], flag: str) -> list[str]:
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2 :]


@pytest.fixture(scope="module")
def trained(swift: OwnEnvironment, page: tuple[Path, list[str]]) -> tuple[Path, str]:
    """The folder with all trainings of one process, by name, and what they printed."""
    folder, arguments = page
    evaluated = f"--val_dataset {folder}/weighted/train-00000.jsonl --eval_on_start true"
    end_to_end = "--per_device_train_batch_size 1 --gradient_accumulation_steps 8"
    jobs = {
        "page": [*arguments, *evaluated.split(), "--per_device_eval_batch_size", "16"],
        "padding-free": [*arguments, "--padding_free", "true"],
        "packed": [*arguments, *f"--packing true --packing_length 700 {end_to_end}".split()],
        "weightless": without(arguments, "--is_binary_loss_scale"),
        "rendered-again": without(arguments, "--use_chat_template"),
        "too-short": [*arguments, "--max_length", "100"],
    }
    (folder / "jobs.json").write_text(
        json.dumps({name: [*job, "--output_dir", name] for name, job in jobs.items()})
    )
    return folder, swift.python(str(SCRIPT), "jobs.json", cwd=folder)


@pytest.fixture(scope="module")
def samples(weighted_store: Path) -> list[Sample]:
    return stored_samples(open_store(weighted_store), "block")


def step(samples: list[Sample]) -> dict[str, Tensor]:
    labels = sum(sample.num_scored for sample in samples)
    return parameters_after(asset("initial"), [(sample, RATE / labels) for sample in samples])


@pytest.fixture(scope="module")
def expected(samples: list[Sample]) -> dict[str, Tensor]:
    return step(samples)


@pytest.mark.parametrize("name", ["page", "padding-free", "packed"])
def test_one_step(trained: tuple[Path, str], expected: dict[str, Tensor], name: str) -> None:
    after = parameters_in(trained[0] / name)
    assert largest_difference(after, parameters_in(asset("initial"))) > 0.1, "large enough to test"
    assert largest_difference(after, expected) <= TOLERANCE


def test_evaluation_is_weighted(trained: tuple[Path, str]) -> None:
    """Over the training rows, before the step: the loss of the step itself, which moved the parameters as it should."""
    evaluated, stepped = map(json.loads, (trained[0] / "page" / "logging.jsonl").read_text().splitlines()[:2])
    assert evaluated["eval_loss"] == pytest.approx(stepped["loss"], rel=1e-6)


def test_the_flags_are_needed(
    trained: tuple[Path, str], expected: dict[str, Tensor], samples: list[Sample]
) -> None:
    """Without one every weight is 1; without the other a template stands around each sample."""
    folder, output = trained
    weightless = parameters_in(folder / "weightless")
    ones = [replace(sample, weights=[float(weight > 0) for weight in sample.weights]) for sample in samples]
    assert largest_difference(weightless, step(ones)) <= TOLERANCE
    assert largest_difference(weightless, expected) > 0.1
    assert largest_difference(parameters_in(folder / "rendered-again"), expected) > 0.1
    assert not any((folder / "too-short").rglob("model.safetensors"))
    assert re.search(r"too-short: Current length of row\(\d+\) is larger than the max_length\(100\)", output)


def test_the_export_names_the_flags_of_the_page(page: tuple[Path, list[str]]) -> None:
    folder, arguments = page
    assert FLAGS in " ".join(arguments)
    assert json.loads((folder / "weighted" / "pear_export.json").read_text())["flags"] == FLAGS


def test_two_ranks(swift: OwnEnvironment, page: tuple[Path, list[str]], expected: dict[str, Tensor]) -> None:
    folder, arguments = page
    ranks = "--per_device_train_batch_size 4 --use_cpu true --ddp_backend gloo --output_dir ranks"
    (folder / "ranks.json").write_text(json.dumps({"ranks": [*arguments, *ranks.split()]}))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    swift.python(*launch, str(SCRIPT), "ranks.json", cwd=folder)
    assert largest_difference(parameters_in(folder / "ranks"), expected) <= TOLERANCE
