"""The command that goes on: complete, quoted, with what the environment said and without what is secret."""

from __future__ import annotations

import shlex

import pytest

from pear_data.invocation import command_line, how_to_go_on

ENVIRONMENT = {
    "PEAR_STORE": "/my stores/one",
    "PEAR_WEIGHT_GAMMA": "0.5",
    "PEAR_SCORE_MODEL": "m",
    "HF_TOKEN": "x",
}


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        (["weight"], "weight", "PEAR_STORE='/my stores/one' PEAR_WEIGHT_GAMMA=0.5 pear-data weight"),
        (["weight", "--store", "s"], "weight", "PEAR_WEIGHT_GAMMA=0.5 pear-data weight --store s"),
        (["weight", "--store=s"], "weight", "PEAR_WEIGHT_GAMMA=0.5 pear-data weight --store=s"),
        (
            ["run", "it's.yaml", "--store=s"],
            "run",
            "PEAR_SCORE_MODEL=m PEAR_WEIGHT_GAMMA=0.5 pear-data run 'it'\"'\"'s.yaml' --store=s",
        ),
        (["demo", "a b"], "demo", "pear-data demo 'a b'"),
        (
            ["--debug", "sql", "select 1"],
            "sql",
            "PEAR_STORE='/my stores/one' pear-data --debug sql 'select 1'",
        ),
    ],
)
def test_the_command_line(arguments, name, expected):
    assert command_line(arguments, name, ENVIRONMENT) == expected
    assert shlex.split(expected)[-len(arguments) :] == arguments


def test_it_holds_no_secret():
    arguments = ["score", "https://u:pw@host/c.jsonl?token=abc", "--engine-arg", "hf_token=def"]
    assert command_line(arguments, "score", {}) == (
        "pear-data score 'https://***@host/c.jsonl?token=***' --engine-arg hf_token=***"
    )


def test_what_is_kept_depends_on_the_command(monkeypatch):
    monkeypatch.delenv("PEAR_STORE", raising=False)
    assert how_to_go_on(["score"], "score").endswith("shards are kept. Resume with: pear-data score")
    assert "Resume, with the same standard input, with: pear-data ingest -" in how_to_go_on(
        ["ingest", "-"], "ingest"
    )
    assert "Give it again with: pear-data export out" in how_to_go_on(["export", "out"], "export")
