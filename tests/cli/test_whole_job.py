"""The user's day by its commands, each number against plain transformers and the paper's formulas."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pear_data import importance_weights, open_store
from pear_data.cli.entry import run
from pear_data.demo import asset


def bundled_rows():
    with gzip.open(asset("corpus"), "rt") as file:
        return [json.loads(line) for line in file.readlines()[:60]]


def reference_logprobs(policy, ids, mask):
    """Plain transformers in float32, log-softmax in float64, one sample at a time."""
    with torch.inference_mode():
        logits = policy(torch.tensor([ids])).logits[0, :-1].double()
    logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    return logprobs[np.array(mask[1:])]


@pytest.mark.parametrize("policy", ["initial", "behavior"])
def test_stored_logprobs_are_those_of_plain_transformers(job, policy):
    store = open_store(job / "store")
    model = AutoModelForCausalLM.from_pretrained(asset(policy), dtype=torch.float32)
    corpus, scores = store.corpus.to_table().to_pylist(), store.scores[policy].to_table().to_pylist()
    assert len(corpus) == len(scores) == 60
    worst = 0.0
    for sample, score in zip(corpus, scores, strict=True):
        want = reference_logprobs(model, sample["input_ids"], sample["loss_mask"])
        worst = max(worst, float(np.abs(np.array(score["logprobs"]) - want).max()))
        assert score["logprob_sum"] == pytest.approx(want.sum(), abs=1e-3)
    print(f"{policy}: max |difference| {worst:.1e} over {len(corpus)} samples")
    assert worst <= 2e-5


def test_ids_are_the_chat_template_s_and_scored_tokens_end_with_the_turn(job):
    tokenizer = AutoTokenizer.from_pretrained(asset("initial"))
    rows = bundled_rows()
    for row, sample in zip(rows, open_store(job / "store").corpus.to_table().to_pylist(), strict=True):
        assert sample["sample_id"] == row["id"]
        assert sample["label"] == row["label"]
        assert sample["input_ids"] == tokenizer.apply_chat_template(row["messages"])["input_ids"]
        scored = [token for token, on in zip(sample["input_ids"], sample["loss_mask"], strict=True) if on]
        assert tokenizer.decode(scored) == row["messages"][-1]["content"] + "<|im_end|>"


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_stored_weights_follow_from_stored_logprobs(job, level):
    store = open_store(job / "store")
    tables = (store.scores["initial"], store.scores["behavior"], store.weights[level], store.corpus)
    for initial, behavior, weighted, sample in zip(
        *(table.to_table().to_pylist() for table in tables), strict=True
    ):
        if sample["label"] < 0:
            assert weighted["status"] == "dropped"
            continue
        want = importance_weights(
            initial["logprobs"], behavior["logprobs"], [initial["num_scored"]], level=level
        )
        np.testing.assert_allclose(weighted["weights"], want, rtol=1e-6)


def test_sql_answers_the_readme_s_question(job, capsys):
    query = (
        "select source, avg(weight_mean) w, sum(num_scored) n from samples group by source order by source"
    )
    assert run(["sql", query, "--format", "json", "--store", str(job / "store")]) == 0
    got = json.loads(capsys.readouterr().out)
    store = open_store(job / "store")
    corpus, weights = store.corpus.to_table().to_pylist(), store.weights["block"].to_table().to_pylist()
    for source in {sample["source"] for sample in corpus}:
        rows = [w for sample, w in zip(corpus, weights, strict=True) if sample["source"] == source]
        (answer,) = [row for row in got if row["source"] == source]
        assert answer["w"] == pytest.approx(np.mean([np.mean(row["weights"]) for row in rows]))
        assert int(answer["n"]) == sum(row["num_scored"] for row in rows)


def test_stats_in_a_pipe(job, capsys):
    assert run(["stats", "--format", "json", "--store", str(job / "store")]) == 0
    names = [one["weights"] for one in json.loads(capsys.readouterr().out)]
    assert sorted(names) == ["block", "sequence", "token"]


def test_verify_passes_and_finds_a_flipped_bit(job, capsys, tmp_path):
    assert run(["verify", "--store", str(job / "store")]) == 0
    capsys.readouterr()
    path = next((job / "store" / "scores" / "behavior").glob("*.parquet"))
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
        assert run(["verify", "--store", str(job / "store")]) == 4
        assert str(path) in capsys.readouterr().err
        assert run(["weight", "--name", "other", "--store", str(job / "store")]) == 4
        assert "sha256" in capsys.readouterr().err
    finally:
        path.write_bytes(whole)


def test_scoring_again_changes_nothing_and_other_settings_are_refused(job, capsys):
    store = ["--store", str(job / "store")]
    before = {path: path.stat().st_mtime_ns for path in (job / "store").rglob("*.parquet")}
    model = ["--policy", "behavior", "--model", str(asset("behavior")), "--engine", "transformers"]
    assert run(["score", *model, *store]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (job / "store").rglob("*.parquet")}
    capsys.readouterr()
    assert run(["score", *model, "--dtype", "bfloat16", *store]) == 4
    assert 'dtype: was "float32", now "bfloat16"' in capsys.readouterr().err
    assert run(["score", *model[:3], str(asset("initial")), *store]) == 4
    assert "weights_sha256" in capsys.readouterr().err


def test_another_corpus_is_refused(job, capsys, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a", "completion": "b"}\n')
    arguments = ["score", str(other), "--model", str(asset("initial")), "--store", str(job / "store")]
    assert run(arguments) == 4
    assert "inputs" in capsys.readouterr().err


def test_overlong_samples_get_a_status_and_exit_3(job, capsys, tmp_path):
    store = ["--store", str(job / "store")]
    lengths = open_store(job / "store").corpus.to_table()["num_tokens"].to_pylist()
    longest = sorted(lengths)[len(lengths) // 2]
    arguments = ["--policy", "short", "--model", str(asset("initial")), "--max-length", str(longest)]
    assert run(["score", *arguments, "--engine", "transformers", *store]) == 3
    rows = open_store(job / "store").scores["short"].to_table().to_pylist()
    assert [row["status"] for row in rows] == ["too_long" if n > longest else "ok" for n in lengths]
    assert {len(row["logprobs"]) - row["num_scored"] for row in rows if row["status"] == "ok"} == {0}
    assert {row["logprobs"] for row in rows if row["status"] != "ok"} == {None}


def test_logprobs_recorded_at_generation_time(job, capsys, tmp_path):
    scores = open_store(job / "store").scores["behavior"].to_table().to_pylist()
    rows = bundled_rows()
    for row, score in zip(rows, scores, strict=True):
        row["logprobs"] = score["logprobs"]
    rows[3]["logprobs"] = rows[3]["logprobs"][:-1]
    rows[4]["logprobs"][0] = 0.5
    rows[5]["logprobs"][0] = None
    rows[6]["logprobs"] = "none"
    del rows[7]["logprobs"]
    corpus = tmp_path / "recorded.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = ["--tokenizer", str(asset("initial")), "--store", str(tmp_path / "store")]
    assert run(["score", str(corpus), *tokenizer, "--policy", "behavior", "--from-field", "logprobs"]) == 3
    errors = capsys.readouterr().err
    for message in ("log-probs for", "above 0", "not a list of numbers"):
        assert message in errors
    stored = open_store(tmp_path / "store").scores["behavior"].to_table().to_pylist()
    assert [index for index, row in enumerate(stored) if row["status"] == "bad_field"] == [3, 4, 5, 6, 7]
    good = [index for index in range(60) if index not in (3, 4, 5, 6, 7)]
    assert [stored[index]["logprobs"] for index in good] == [scores[index]["logprobs"] for index in good]
    assert run(["score", *tokenizer[2:], "--policy", "other", "--from-field", "nothing"]) == 2


def test_a_policy_with_another_tokenizer_is_refused(job, capsys, tmp_path):
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(asset("behavior")).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(asset("behavior"))
    tokenizer.save_pretrained(other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    arguments = ["score", "--policy", "swapped", "--model", str(other), "--store", str(job / "store")]
    assert run(arguments) == 4
    message = capsys.readouterr().err
    assert "cannot score this corpus: id" in message
    assert "--from-field" in message


def test_unknown_model_and_missing_choices_are_one_line(job, capsys):
    store = ["--store", str(job / "store")]
    assert run(["score", "--policy", "x", "--model", "./nowhere", *store]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run(["score", "--policy", "x", *store]) == 2
    assert "give either --model M, or --from-field F" in capsys.readouterr().err


def test_several_levels_are_made_in_one_pass(job, capsys):
    store = str(job / "store")
    several = ["--level", "token", "--level", "block", "--level", "dft", "--block-by", "sentences"]
    assert run(["weight", "--store", store, *several, "--name", "one"]) == 2
    assert "--name: several levels cannot share a name" in capsys.readouterr().err
    assert run(["weight", "--store", store, *several, "--overwrite"]) in (0, 3)
    for level in ("token", "dft"):
        assert run(["weight", "--store", store, "--level", level, "--name", f"{level}-alone"]) in (0, 3)
    found = open_store(job / "store")
    for level in ("token", "dft"):
        assert found.weights[level].to_table().equals(found.weights[f"{level}-alone"].to_table())
    assert found.stage("weights/block").settings["block_by"] == "sentences"
    assert "block_by" not in found.stage("weights/token").settings


def test_sources_options_come_from_a_file(job, capsys, tmp_path):
    store, options = str(job / "store"), tmp_path / "sources.yaml"
    source = open_store(job / "store").corpus.to_table()["source"][0].as_py()
    options.write_text(f"{source}: {{gamma: 1, clip_log_ratio: [-0.2, 0.3]}}\n")
    assert run(["weight", "--store", store, "--per-source", str(options), "--name", "own"]) in (0, 3)
    kept = open_store(job / "store").stage("weights/own").settings["per_source"]
    assert kept == {source: {"gamma": 1, "clip_log_ratio": [-0.2, 0.3], "clip_log_weight": None}}
    for text, fault in (
        ("x: {gamma: 2}", "gamma"),
        ("- x", "per-source"),
        ("x: {", "not valid YAML"),
        ("x: {y: 1}", "y"),
    ):
        options.write_text(text)
        assert run(["weight", "--store", store, "--per-source", str(options), "--name", "bad"]) == 2
        error = capsys.readouterr().err
        assert fault in error
        assert "Traceback" not in error


def test_levels_come_from_the_environment(job, monkeypatch, capsys):
    store = str(job / "store")
    monkeypatch.setenv("PEAR_WEIGHT_LEVEL", "bogus")
    assert run(["weight", "--store", store]) == 2
    assert "bogus" in capsys.readouterr().err
    monkeypatch.setenv("PEAR_WEIGHT_LEVEL", "sequence uniform")
    assert run(["weight", "--store", store]) in (0, 3)
    assert {"sequence", "uniform"} <= open_store(job / "store").weights.keys()
