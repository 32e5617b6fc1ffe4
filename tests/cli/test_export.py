"""`export` as typed: every format from a corpus of text, what is refused with which exit code, and `--check`."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.demo import asset
from pear_data.stages.export.swift import FLAGS

FORMATS = ("hf", "hf-packed", "verl", "swift", "shifted", "messages")


def command(job, out, *options):
    return run(["export", str(out), "--store", str(job / "store"), *options])


def options_of(form):
    return {"hf-packed": ["--max-length", "512"], "messages": ["--weights", "sequence"]}.get(form, [])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weighted(job, name):
    """Sample id -> (ids, weight of each token), of the samples with status ok."""
    store = open_store(job / "store")
    corpus, weights = store.corpus.to_table().to_pylist(), store.weights[name].to_table().to_pylist()
    found = {}
    for sample, row in zip(corpus, weights, strict=True):
        if row["status"] == "ok":
            at_labels = np.zeros(len(sample["input_ids"]))
            at_labels[np.array(sample["loss_mask"])] = np.float32(row["weights"])
            found[sample["sample_id"]] = (sample["input_ids"], at_labels)
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_written_checked_and_found_again(job, tmp_path, capsys, form):
    asked = ["--format", form, "--eval-fraction", "0.2", *options_of(form)]
    assert command(job, tmp_path / "out", *asked) == 0
    told = capsys.readouterr().err
    assert "read again and sound" in told
    assert "pear_data/hooks/" in told
    assert run(["export", str(tmp_path / "out"), "--check"]) == 0
    assert "every one sound" in capsys.readouterr().err
    assert command(job, tmp_path / "out", *asked) == 0
    assert "nothing to do" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "pear_export.json").read_text())
    wanted = weighted(job, manifest["weighting"])
    assert manifest["samples"] == len(wanted)
    assert manifest["splits"]["validation"] > 0
    assert {file["split"] for file in manifest["files"]} == {"train", "validation"}


def test_swift_has_whole_samples_up_to_their_end_of_turn(job, tmp_path, capsys):
    assert command(job, tmp_path / "out", "--format", "swift") == 0
    assert FLAGS in capsys.readouterr().err
    end = AutoTokenizer.from_pretrained(asset("initial")).eos_token_id
    wanted = weighted(job, "block")
    rows = lines(tmp_path / "out" / "train-00000.jsonl")
    assert [row["sample_id"] for row in rows] == list(wanted)
    for row in rows:
        ids, weights = wanted[row["sample_id"]]
        (message,) = row["messages"]
        content = message["content"]
        assert message["role"] == "assistant"
        assert content["token_ids"] == ids[: len(content["token_ids"])]
        assert content["token_ids"][-1] == end
        np.testing.assert_array_equal(content["loss_scale"], weights[: len(content["loss_scale"])])
        assert content["loss_scale"][-1] > 0
        assert not weights[len(content["loss_scale"]) :].any()


def test_messages_have_the_sample_s_weight(job, tmp_path):
    assert command(job, tmp_path / "out", "--format", "messages", "--weights", "sequence") == 0
    with gzip.open(asset("corpus"), "rt") as file:
        originals = {row["id"]: row for row in map(json.loads, file)}
    wanted = weighted(job, "sequence")
    rows = lines(tmp_path / "out" / "train-00000.jsonl")
    assert [row["sample_id"] for row in rows] == list(wanted)
    for row in rows:
        weight = wanted[row["sample_id"]][1].max()
        assert row["loss_multiplier"] == weight
        for message, original in zip(row["messages"], originals[row["sample_id"]]["messages"], strict=True):
            assert message["role"] == original["role"]
            assert message["content"] == [{"type": "text", "value": original["content"]}]
            assert message["loss_weight"] == (weight if original["role"] == "assistant" else 0.0)


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (["--format", "slime"], 2, "--format: slime casts loss masks to integers"),
        (["--format", "trl"], 2, "--format: trl is a trainer: it takes --format hf (or hf-packed)"),
        (["--format", "hf-packed"], 2, "hf-packed needs max_length"),
        (["--format", "messages"], 2, "weights/block is of level block"),
        (["--weights", "nothing"], 2, "has no weights/nothing"),
        (["--where", "ess >"], 2, "does not parse"),
        (["--where", "wheight > 1"], 1, "wheight"),
        (["--eval-fraction", "1"], 2, "--eval-fraction: Input should be less than 1"),
        (["--live", "--behavior", "nobody"], 2, "has no scores/nobody"),
        (["--live", "--format", "verl"], 2, "live goes with format hf or hf-packed"),
    ],
)
def test_what_is_refused(job, tmp_path, capsys, asked, code, said):
    assert command(job, tmp_path / "out", *asked) == code
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_check_tells_a_fault_from_damage(job, tmp_path, capsys):
    assert run(["export", str(tmp_path / "out"), "--check"]) == 2
    assert "there is no export at" in capsys.readouterr().err
    assert command(job, tmp_path / "out") == 0
    path = tmp_path / "out" / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    assert run(["export", str(tmp_path / "out"), "--check"]) == 4
    assert "is not the file that was written" in capsys.readouterr().err
    assert command(job, tmp_path / "out", "--weights", "token") == 4
    assert 'weighting: was "block", now "token"' in capsys.readouterr().err


def test_a_recipe_may_export_several_formats(job, tmp_path, capsys):
    recipe = tmp_path / "exports.yaml"
    steps = [
        {"export": {"out": str(tmp_path / "hf"), "where": "ess > 1", "live": True, "eval_fraction": 0.1}},
        {"export": {"out": str(tmp_path / "packs"), "format": "hf-packed", "max_length": 256}},
        {"export": {"out": str(tmp_path / "packs"), "check": True}},
    ]
    recipe.write_text(json.dumps({"store": str(job / "store"), "steps": steps}))
    assert run(["run", str(recipe)]) == 0
    assert "every one sound" in capsys.readouterr().err
    assert pq.read_table(tmp_path / "hf" / "train-00000.parquet").column_names[-1] == "behavior_logprobs"
    recipe.write_text(json.dumps({"steps": [{"export": {"out": "x", "format": "areal"}}]}))
    assert run(["run", str(recipe)]) == 2
    assert "AReaL casts loss masks to booleans" in capsys.readouterr().err
