"""An export trained by the real Axolotl in an environment of its own: one SGD step against sum(w * nll) / N."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.demo import asset
from pear_data.schema import EXPORT_HF

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "pear_data" / "hooks" / "axolotl.md"
TOLERANCE = 2e-6
VOCAB = 416

# Axolotl with the versions it pins of what touches a batch or a loss, over the packages of this environment. The rest
# of its requirements (GPU kernels, clouds, user interfaces) is not on the way of a training on a CPU.
REQUIREMENTS = [
    "axolotl==0.19.0",
    "transformers==5.16.1",
    "trl==1.9.0",
    "accelerate==1.13.0",
    "peft==0.20.0",
    "datasets==4.8.4",
    "huggingface_hub==1.17.0",
    "axolotl-contribs-lgpl==0.0.7",
    "axolotl-contribs-mit==0.0.6",
    "bitsandbytes==0.50.2",
    "evaluate==0.4.1",
    "posthog==6.7.11",
    "wandb==0.31.0",
    "addict==2.4.0",
    "fire==0.7.1",
    "colorama==0.4.6",
    "termcolor==3.3.0",
    "backoff==2.2.1",
    "distro==1.9.0",
    "fastcore==2.2.39",
    "six==1.17.0",
    "platformdirs==4.14.9",
]
ONE_STEP: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "attn_implementation": "sdpa",
    "dataset_num_proc": 1,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def axolotl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment variables under which Python finds Axolotl."""
    folder = tmp_path_factory.mktemp("axolotl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*install, *REQUIREMENTS], check=True, timeout=300)
    yield {
        **os.environ,
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    shutil.rmtree(folder)


def make_rows(count: int = 16) -> list[dict[str, Any]]:
    """Ragged rows of 4 to 40 tokens; weights from 0 to 3, a tenth 0, a twentieth negative."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for i in range(count):
        length = int(torch.randint(4, 41, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        scored = torch.arange(length) >= int(torch.randint(1, length, (), generator=generator))
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


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen with a real tokenizer, saved as users have theirs."""
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(asset("initial")).save_pretrained(folder)
    return folder


def expected_step(policy: Path, rows: list[dict[str, Any]]) -> tuple[dict[str, Tensor], float]:
    """The parameters after one SGD step of lr 1 on sum(w * nll) / N, and the loss, in float64, row by row."""
    model = Qwen2ForCausalLM.from_pretrained(policy, dtype=torch.float64).train()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        logprobs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        for t, weight in enumerate(row["loss_weights"]):
            if row["labels"][t] != -100:
                total = total - weight * logprobs[t - 1, ids[t]]
    loss = total / sum(label != -100 for row in rows for label in row["labels"])
    loss.backward()
    return {name: value.detach() - value.grad for name, value in model.named_parameters()}, loss.item()


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(
        float((actual[name].double() - expected[name].double()).abs().max()) for name in actual | expected
    )


def write_export(
    folder: Path,
    rows: list[dict[str, Any]],
    weighting: str = "block",
    validation: list[dict[str, Any]] | None = None,
) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "pear_export.json").write_text(json.dumps({"format": "hf", "weighting": weighting}))
    for split, split_rows in (("train", rows), ("validation", validation)):
        if split_rows:
            table = pa.Table.from_pylist(split_rows, EXPORT_HF)
            pq.write_table(table, folder / f"{split}-00000.parquet")


def page_block(language: str) -> str:
    return PAGE.read_text().split(f"```{language}\n")[1].split("```")[0]


def train(
    folder: Path, policy: Path, environment: dict[str, str], processes: int = 1, **changes: Any
) -> dict[str, Tensor]:
    """The parameters that the page's configuration leaves, changed to one step on a CPU; its output in train.log."""
    settings = yaml.safe_load(page_block("yaml"))
    settings |= ONE_STEP | {"base_model": str(policy), "output_dir": str(folder / "trained")} | changes
    for dataset in [*settings["datasets"], *settings.get("test_datasets", [])]:
        dataset["path"] = str(folder / dataset["path"])
    settings["dataset_prepared_path"] = str(folder / "prepared")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launch, "-m", "axolotl.cli.train", str(folder / "config.yaml")]
    log = folder / "train.log"
    with log.open("wb") as output:
        done = subprocess.run(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, timeout=300
        )
    assert done.returncode == 0, log.read_text()[-5000:]
    return safetensors.torch.load_file(folder / "trained" / "model.safetensors")


def test_the_page(axolotl: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its export, then its configuration: two bins of Axolotl's own sample packing, a micro-batch each."""
    monkeypatch.chdir(tmp_path)
    corpus = [str(asset("corpus")), "--limit", "16", "--engine", "transformers"]
    assert run(["score", *corpus, "--model", str(asset("initial"))]) == 0
    behavior = ["--policy", "behavior", "--model", str(asset("behavior")), "--engine", "transformers"]
    assert run(["score", *behavior]) == 0
    assert run(["weight", "--level", "block"]) == 0
    assert run(shlex.split(page_block(""))[1:]) == 0
    rows = stored_rows(open_store("pear_store"))
    half = sum(len(row["input_ids"]) for row in rows) // 2
    longest = max(len(row["input_ids"]) for row in rows)
    after = train(tmp_path, asset("initial"), axolotl, sequence_len=half + longest, micro_batch_size=1)
    before = safetensors.torch.load_file(asset("initial") / "model.safetensors")
    expected, _ = expected_step(asset("initial"), rows)
    assert largest_difference(after, before) > 0.01, "the step must be large enough to test"
    assert largest_difference(after, expected) <= TOLERANCE


def stored_rows(store: Any) -> list[dict[str, Any]]:
    """Samples and their block weights as rows, put together from the store."""
    rows = []
    for sample, weighted in zip(
        store.corpus.to_table().to_pylist(), store.weights["block"].to_table().to_pylist(), strict=True
    ):
        weights = iter(weighted["weights"])
        scored = list(zip(sample["input_ids"], sample["loss_mask"], strict=True))
        rows.append(
            {
                "input_ids": sample["input_ids"],
                "labels": [token if is_scored else -100 for token, is_scored in scored],
                "loss_weights": [next(weights) if is_scored else 0.0 for _, is_scored in scored],
            }
        )
    return rows


def test_padded_evaluated_and_exported_again(axolotl: dict[str, str], policy: Path, tmp_path: Path) -> None:
    """The second export stands where the first one did: Axolotl would take its own prepared copy of the first."""
    padded = {
        "sample_packing": False,
        "sequence_len": 64,
        "micro_batch_size": 8,
        "eval_batch_size": 16,
        "test_datasets": [{"path": "weighted", "split": "validation"}],
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    expected, loss = expected_step(policy, ROWS)
    write_export(tmp_path / "weighted", ROWS, "block", validation=ROWS)
    assert largest_difference(train(tmp_path, policy, axolotl, **padded), expected) <= TOLERANCE
    losses = re.findall(r"'eval_loss': '([0-9.]+)'", (tmp_path / "train.log").read_text())
    assert float(losses[0]) == pytest.approx(loss, abs=1e-3), "of the initial policy"
    halved = [{**row, "loss_weights": [weight / 2 for weight in row["loss_weights"]]} for row in ROWS]
    write_export(tmp_path / "weighted", halved, "halved", validation=halved)
    expected, _ = expected_step(policy, halved)
    assert largest_difference(train(tmp_path, policy, axolotl, **padded), expected) <= TOLERANCE


# Axolotl places the model of rank 1 on accelerator 1, which is not here.
ON_THE_CPU = """
from axolotl.integrations.base import BasePlugin

class OnTheCpu(BasePlugin):
    def load_datasets(self, cfg, preprocess=False):
        cfg.device_map = {"": "cpu"}
"""


def test_two_processes(axolotl: dict[str, str], policy: Path, tmp_path: Path) -> None:
    (tmp_path / "on_the_cpu.py").write_text(ON_THE_CPU)
    write_export(tmp_path / "weighted", ROWS)
    after = train(
        tmp_path,
        policy,
        axolotl | {"ACCELERATE_USE_CPU": "true"},
        processes=2,
        plugins=["pear_data.hooks.axolotl.PearPlugin", "on_the_cpu.OnTheCpu"],
        sample_packing=False,
        sequence_len=64,
        micro_batch_size=4,
    )
    expected, _ = expected_step(policy, ROWS)
    assert largest_difference(after, expected) <= TOLERANCE


REFUSE = """
import json, sys
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
manager = PluginManager.get_instance()
manager.register("pear_data.hooks.axolotl.PearPlugin")
[plugin] = manager.plugins.values()
answers = {}
for name, value in json.loads(sys.argv[1]).items():
    try:
        plugin.register(DictDefault({"excess_length_strategy": "raise", "datasets": [], name: value}))
        answers[name] = "accepted"
    except ValueError as error:
        answers[name] = str(error)
print(json.dumps(answers))
"""


def test_what_would_lose_the_weights_is_refused(axolotl: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pear_export.json").write_text('{"format": "hf-packed"}')
    settings: dict[str, Any] = {
        "datasets": [{"path": str(tmp_path)}],
        "chunked_cross_entropy": True,
        "liger_fused_linear_cross_entropy": True,
        "use_eaft": True,
        "orpo_alpha": 0.1,
        "rl": "dpo",
        "reward_model": True,
        "trainer_cls": "some.Trainer",
        "pretraining_dataset": [{"path": "weighted"}],
        "streaming": True,
        "use_pose": True,
        "context_parallel_size": 2,
        "excess_length_strategy": "truncate",
    }
    harmless = {"val_set_size": 0.1, "adapter": "lora", "batch_flattening": True, "group_by_length": True}
    done = subprocess.run(
        [sys.executable, "-c", REFUSE, json.dumps(settings | harmless)],
        env=axolotl,
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = json.loads(done.stdout.splitlines()[-1])
    assert {answers[name] for name in harmless} == {"accepted"}
    assert answers.pop("datasets").endswith("is an export of --format hf-packed: Axolotl takes --format hf")
    for name in settings.keys() - {"datasets"}:
        assert re.search(rf"\b{name}\b.*(: |, )", answers[name]), answers[name]
