"""The audit: known noise is measured exactly, real noise is told of, and what cannot be audited is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.config import ScoreSettings
from pear_data.demo import asset
from pear_data.errors import MismatchError, UsageError
from pear_data.progress import Silent
from pear_data.stages.audit import audit_policy
from pear_data.stages.histogram import RELATIVE_ERROR
from pear_data.stages.noise import stored_audit
from pear_data.stages.score import score
from pear_data.store import writable_store

SAMPLES = 40


@pytest.fixture(scope="module")
def scored(tmp_path_factory, ingested, source_of):
    """A store whose initial policy is scored in float32, in three shards."""
    folder = shutil.copytree(ingested, tmp_path_factory.mktemp("scored") / "store")
    with writable_store(folder) as store:
        score(store, ScoreSettings(model="initial"), source_of("initial"), Silent())
    return folder


@pytest.fixture
def folder(scored, tmp_path):
    return shutil.copytree(scored, tmp_path / "store")


@pytest.fixture(scope="module")
def double():
    """Log-probs of a sample's scored tokens in float64 throughout."""
    model = AutoModelForCausalLM.from_pretrained(
        asset("initial"), dtype=torch.float64, attn_implementation="eager"
    )

    def logprobs(sample):
        ids = torch.tensor(sample["input_ids"])
        with torch.inference_mode():
            rows = model(ids[None]).logits[0, :-1].log_softmax(-1)
        return rows.gather(1, ids[1:, None])[:, 0].numpy()[np.array(sample["loss_mask"][1:])]

    return logprobs


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def audit(folder, count, *, model="initial", policy="initial"):
    heard = Heard()
    with writable_store(folder) as store:
        settings = ScoreSettings(policy=policy, model=str(asset(model)), audit=count)
        outcome = audit_policy(store, settings, heard)
    return stored_audit(open_store(folder).stage(f"scores/{policy}")), outcome, heard.lines


def rewrite(folder, change):
    """Pass every row of scores/initial through `change(row)`, shard by shard, through the real writer."""
    import pyarrow as pa

    from pear_data.schema import SCORES
    from pear_data.store.shards import parquet_shard

    with writable_store(folder) as store:
        for shard in store.stage("scores/initial").shards:
            groups = [table.to_pylist() for table in store.row_groups(shard)]
            with parquet_shard(store.path / shard.file.path, SCORES) as writer:
                for group in groups:
                    writer.write(pa.Table.from_pylist([change(row) for row in group], SCORES))
            shard.file = store.entry_of(store.path / shard.file.path)
        store.save()


def samples_of(folder):
    return open_store(folder).corpus.to_table().to_pylist()


def test_float32_scores_against_float64(folder, double):
    found, outcome, lines = audit(folder, 1000)
    store = open_store(folder)
    scores = store.scores["initial"].to_table().to_pylist()
    errors = [
        np.array(row["logprobs"]) - double(sample)
        for sample, row in zip(samples_of(folder), scores, strict=True)
    ]
    assert (found.samples, found.tokens) == (SAMPLES, sum(map(len, errors)))
    assert np.abs(np.concatenate(errors)).max() <= 2e-5
    assert 0 < found.median <= found.p99 <= found.max <= 2e-5
    assert lines == []
    assert "log-ratio clips are -0.08 and 0.3" in outcome.summary
    assert outcome.rejected == 0


def test_known_noise_is_measured_exactly(folder, double):
    random = np.random.default_rng(2)
    noise = {}

    def disturb(row):
        size = random.laplace(0.01, 0.03, row["num_scored"])
        values = (np.array(row["logprobs"]) + size).astype(np.float32)
        noise[row["sample_id"]] = values
        return row | {"logprobs": values.tolist()}

    rewrite(folder, disturb)
    found, outcome, lines = audit(folder, 1000)
    samples = samples_of(folder)
    errors = {s["sample_id"]: noise[s["sample_id"]] - double(s) for s in samples}
    flat = np.concatenate(list(errors.values()))
    assert found.max == pytest.approx(np.abs(flat).max(), abs=1e-5)
    assert found.mean == pytest.approx(np.abs(flat).mean(), abs=1e-6)
    assert found.bias == pytest.approx(flat.mean(), abs=1e-6)
    for value, share in ((found.median, 0.5), (found.p99, 0.99)):
        expected = np.quantile(np.abs(flat), share, method="inverted_cdf")
        assert value == pytest.approx(expected, rel=2 * RELATIVE_ERROR, abs=1e-5)
    (worst,) = [s for s in samples if s["sample_id"] == found.max_sample_id]
    place = int(np.abs(errors[found.max_sample_id]).argmax())
    assert np.abs(errors[found.max_sample_id]).max() == np.abs(flat).max()
    assert found.max_position == np.flatnonzero(worst["loss_mask"])[place]
    assert f"(sample {found.max_sample_id}, position {found.max_position})" in outcome.summary
    (warning,) = lines
    assert f"{100 * found.p99 / 0.08:.0f} % of the smaller log-ratio clip" in warning


def test_a_part_of_the_corpus_is_the_same_each_time_and_only_rows_with_logprobs(folder):
    ids = [sample["sample_id"] for sample in samples_of(folder)]
    unscored = {"status": "too_long", "logprobs": None, "logprob_sum": None}
    rewrite(folder, lambda row: row | unscored if row["sample_id"] in ids[::2] else row)
    first, _, _ = audit(folder, 7)
    assert first.samples == 7
    assert audit(folder, 7)[0] == first
    assert audit(folder, 1000)[0].samples == SAMPLES // 2
    rewrite(folder, lambda row: row | unscored)
    _, outcome, _ = audit(folder, 7)
    assert "nothing to audit" in outcome.summary


def test_an_audit_changes_neither_fingerprint_nor_files(folder):
    before = open_store(folder).stage("scores/initial")
    audit(folder, 3)
    after = open_store(folder).stage("scores/initial")
    assert after.fingerprint == before.fingerprint
    assert after.shards == before.shards
    assert run(["verify", "--store", str(folder)]) == 0


def test_another_model_none_and_what_has_no_model_are_refused(folder, capsys):
    with pytest.raises(MismatchError, match="was not scored with .*behavior"):
        audit(folder, 3, model="behavior")
    with writable_store(folder) as store, pytest.raises(UsageError, match="give it with --model"):
        audit_policy(store, ScoreSettings(audit=3), Silent())
    with pytest.raises(UsageError, match="score --policy other"):
        audit(folder, 3, policy="other")
    where = ["--policy", "x", "--audit", "3", "--store", str(folder)]
    assert run(["score", "--from-field", "logprobs", *where]) == 2
    assert "recorded log-probs" in capsys.readouterr().err
    assert run(["score", "--model", str(asset("behavior")), "--align", "bytes", *where]) == 2
    assert "share of a span" in capsys.readouterr().err


def test_half_precision_warns_float32_does_not_and_stats_use_both(folder, tmp_path, capsys):
    where = ["--store", str(folder)]
    model = ["--model", str(asset("initial")), "--engine", "transformers"]
    half = ["--policy", "half", "--dtype", "bfloat16"]
    assert run(["score", *model, *half, "--audit", str(SAMPLES), *where]) == 0
    shown = capsys.readouterr().err.splitlines()
    (warning,) = [line for line in shown if line.startswith("Warning: the noise of half's log-probs")]
    assert "--dtype float32" in warning
    assert any(line.startswith("audit of scores/half: 40 samples") for line in shown)

    recipe = tmp_path / "recipe.yaml"
    step = f"{{model: '{asset('initial')}', engine: transformers, dtype: float32, audit: 5}}"
    recipe.write_text(f"steps:\n  - score: {step}\n  - weight: {{target: half, behavior: initial}}\n")
    assert run(["run", str(recipe), *where]) == 0
    shown = capsys.readouterr().err
    assert "3 of 3 shards were there already" in shown
    assert "audit of scores/initial: 5 samples" in shown
    assert "Warning" not in shown

    assert run(["stats", "--format", "json", *where]) == 0
    (numbers,) = json.loads(capsys.readouterr().out)
    noise = {policy: found["p99"] for policy, found in numbers["audits"].items()}
    assert noise["initial"] < 1e-4 < 0.02 < noise["half"]
    (finding,) = [found for found in numbers["findings"] if found["code"] == "noise_floor"]
    assert finding["value"] == pytest.approx(np.hypot(noise["initial"], noise["half"]))
    assert finding["threshold"] == pytest.approx(0.02)
    assert f"half {noise['half']:.2g}" in finding["text"]
    assert "--dtype float32" in finding["text"]
