"""A secret planted wherever people put one, and looked for in every file written and every line shown."""

from __future__ import annotations

import json

import pytest

from pear_data.cli.entry import run
from pear_data.demo import asset

SECRET = "hf_" + "Zq7" * 11


@pytest.fixture
def leaks(tmp_path, capfd, monkeypatch):
    """`leaks()`: the files and lines that hold the secret; HF_TOKEN holds another."""
    monkeypatch.setenv("HF_TOKEN", "of-no-known-make")
    monkeypatch.delenv("PEAR_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "input_ids": [1, 2, *range(3, 4 + index)],
            "loss_mask": [False, False] + [True] * (1 + index),
            "initial": [-0.5] * (1 + index),
            "behavior": [-0.4] * (1 + index),
        }
        for index in range(6)
    ]
    name = f"corpus.jsonl?token={SECRET}"
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "no tokens"}]))

    def found():
        shown = "".join(capfd.readouterr())
        written = {
            path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != name
        }
        return [
            where
            for where, content in [("the screen", shown.encode()), *written.items()]
            for secret in (SECRET, "of-no-known-make", "s3cr3t")
            if secret.encode() in content
        ]

    return found


@pytest.fixture
def made(tmp_path, leaks):
    """A store made by commands that hold secrets."""
    corpus = ["ingest", str(tmp_path / f"corpus.jsonl?token={SECRET}"), "--tokenizer", str(asset("initial"))]
    assert run(corpus) == 3
    assert run(corpus) == 3  # what was made with the name is found again
    for policy in ("initial", "behavior"):
        assert run(["score", "--policy", policy, "--from-field", policy]) == 0
    assert run(["weight"]) == 0


def test_no_secret_is_stored_logged_exported_or_shown(tmp_path, made, leaks):
    export = ["export", "out", "--where", f"source <> 'https://u:s3cr3t@host/{SECRET}'"]
    assert run(export) == 0
    assert run(export) == 0
    assert run(["report", "-o", "report.html"]) == 0
    for command in ("stats", "status", "verify"):
        assert run([command]) == 0
    assert run(["sql", "select sample_id, source from samples"]) == 0
    assert leaks() == []
    settings = json.loads((tmp_path / "pear_store" / "manifest.json").read_text())["stages"]["corpus"][
        "settings"
    ]
    assert settings["inputs"][0]["name"] == "corpus.jsonl?token=***"


ERRORS = [
    (["score", "--model", "m", "--engine-arg", "hf_token=s3cr3t"], 2),
    (["score", "--model", "m", "--engine-arg", "loader={api_key: s3cr3t}"], 2),
    (["score", "--model", "m", "--engine-arg", "download_dir=https://u:s3cr3t@host/"], 2),
    (["score", "--model", "m", "--engine-arg", "hf_token=s3cr3t", "--debug"], 2),
    (["score", "--model", "https://u:s3cr3t@host/m?token=s3cr3t"], 1),
    (["score", "--model", "https://u:s3cr3t@host/m?token=s3cr3t", "--debug"], 1),
    (["score", "--model", "m", "--policy", f"bad {SECRET}"], 2),
    (["ingest", f"https://u:s3cr3t@host/c?sig={SECRET}", "--tokenizer", str(asset("initial"))], 2),
    (["ingest", "c", "--tokenizer", f"https://u:s3cr3t@host/{SECRET}"], 1),
    (["score", "--from-field", "of-no-known-make"], 4),
    (["weight", "--target", "of-no-known-make"], 2),
    (["run", "https://u:s3cr3t@host/recipe.yaml"], 2),
    (["run", "demo", "--set", "password=s3cr3t"], 2),
    (["show", SECRET], 2),
    (["sql", f"select {SECRET}"], 1),
    (["stats", "--weights", SECRET], 2),
]


def test_no_error_tells_a_secret(made, leaks):
    codes = []
    for arguments, _ in ERRORS:
        codes.append(run(arguments))
        assert leaks() == [], arguments
    assert codes == [code for _, code in ERRORS]
