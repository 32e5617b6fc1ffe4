"""Tinker's real SDK: what its page makes of an export. The training is a remote service and is not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from one_step import stored_samples
from own_environment import Environments
from pages import blocks, words
from transformers import AutoModelForCausalLM

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.demo import asset

pytestmark = pytest.mark.slow

REQUIREMENTS = ["tinker==0.38.0", "pyqwest==0.12.0", "distro==1.9.0", "orjson==3.13.0"]
SHOWN = """
import json
print(json.dumps([
    [datum.model_input.to_ints(), *(datum.loss_fn_inputs[name].to_numpy().tolist() for name in names)]
    + [str(datum.loss_fn_inputs[name].to_numpy().dtype) for name in names]
    for names in [("target_tokens", "weights")] for datum in datums("weighted")
]))
"""


def test_datums_of_the_page(
    environments: Environments, weighted_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross-entropy as Tinker documents it, sum(w * -logprob of the target), over its Datums and from the store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEAR_STORE", str(weighted_store))
    (export,) = blocks("tinker")
    assert run(words(export)[1:]) == 0
    tinker = environments("tinker", REQUIREMENTS)
    made = json.loads(
        tinker.python("-c", blocks("tinker", "python")[0] + SHOWN, cwd=tmp_path).splitlines()[-1]
    )
    model = AutoModelForCausalLM.from_pretrained(asset("initial"), dtype=torch.float64)
    for sample, datum in zip(stored_samples(open_store(weighted_store), "block"), made, strict=True):
        inputs, targets, weights, *types = datum
        assert types == ["int64", "float32"]
        with torch.no_grad():
            of_datum = model(torch.tensor([inputs])).logits[0].log_softmax(-1)
            of_store = model(torch.tensor([sample.ids])).logits[0].log_softmax(-1)
        loss = -sum(
            w * float(of_datum[t, target]) for t, (target, w) in enumerate(zip(targets, weights, strict=True))
        )
        expected = -sum(w * float(of_store[t - 1, sample.ids[t]]) for t, w in enumerate(sample.weights) if t)
        assert loss == pytest.approx(expected, rel=1e-9)
