"""Levanter's real reader, examples and loss on an export, against float64; run by hand, for 1.8 GB of packages.

pip install --target PACKAGES marin-levanter==0.2.20.dev202606180959 gitpython
LEVANTER_PACKAGES=PACKAGES pytest tests/trainers/levanter_by_hand.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from own_environment import OwnEnvironment
from pages import blocks, words

from pear_data import open_store
from pear_data.cli.entry import run

VOCAB, WIDTH = 409, 16
LOSS = """
import json, sys
import haliax as hax, jax.numpy as jnp, numpy as np
from levanter.data.text.examples import GrugLmExample, named_lm_example_from_grug
from levanter.data.text.formats import PrebuiltLmDatasetFormat
from levanter.models.loss import maybe_fused_next_token_loss

form = json.loads(sys.argv[1])
assert form.pop("type") == "prebuilt"
rows = PrebuiltLmDatasetFormat(**form).build_preprocessor(None)([json.loads(line) for line in open(sys.argv[2])])
arrays = np.load("arrays.npz")
Batch, Pos = hax.Axis("batch", len(rows)), hax.Axis("position", len(rows[0]["input_ids"]))
Embed, Vocab = hax.Axis("embed", arrays["head"].shape[0]), hax.Axis("vocab", arrays["head"].shape[1])
examples = [
    named_lm_example_from_grug(
        GrugLmExample.causal(jnp.array(row["input_ids"]), loss_weight=jnp.array(row["loss_weights"])), Pos
    )
    for row in rows
]
print(float(maybe_fused_next_token_loss(
    Pos, Embed, Vocab,
    hax.named(jnp.array(arrays["hidden"]), (Batch, Pos, Embed)),
    hax.named(jnp.array(arrays["head"]), (Embed, Vocab)),
    hax.stack(Batch, [example.tokens for example in examples]),
    loss_weight=hax.stack(Batch, [example.loss_weight for example in examples]),
).array))
"""


def test_loss_of_the_page(weighted_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEAR_STORE", str(weighted_store))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (export,) = blocks("levanter")
    assert run([*words(export)[1:], "--max-length", "600"]) == 0
    corpus = open_store(weighted_store).corpus.to_table().to_pylist()
    weights = open_store(weighted_store).weights["block"].to_table()["weights"].to_pylist()
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(len(corpus), 600, WIDTH)).astype(np.float32)
    head = generator.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    np.savez("arrays.npz", hidden=hidden, head=head)
    form = {"type": "prebuilt", "input_ids_key": "input_ids", "loss_weights_key": "loss_weights"}
    levanter = OwnEnvironment(Path(os.environ["LEVANTER_PACKAGES"]).absolute(), tmp_path / "caches")
    file = "weighted/train-00000.jsonl"
    found = float(levanter.python("-c", LOSS, json.dumps(form), file, cwd=tmp_path).splitlines()[-1])
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    log_normalizer = np.log(np.exp(logits).sum(-1))
    total = mass = 0.0
    for number, (row, of_row) in enumerate(zip(corpus, weights, strict=True)):
        for t, weight in zip(np.flatnonzero(row["loss_mask"]), of_row, strict=True):
            logit = logits[number, t - 1, row["input_ids"][t]]
            total += weight * (log_normalizer[number, t - 1] - logit)
            mass += weight
    assert found == pytest.approx(total / mass, rel=1e-6)
