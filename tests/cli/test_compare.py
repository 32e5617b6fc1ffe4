"""`pear-data compare` on a store that commands made."""

from __future__ import annotations

import json
import shutil

import pytest
from jsonschema import Draft202012Validator

from pear_data.cli.entry import run
from pear_data.resources import folder


def test_weightings_side_by_side(job, capsys):
    assert (
        run(["compare", "block", "sequence", "token", "--samples", "2", "--store", str(job / "store")]) == 0
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    first, *lines = captured.out.splitlines()
    assert first
    heading = next(line for line in lines if "block" in line)
    assert heading.index("block") < heading.index("sequence") < heading.index("token")
    assert any("ESS / tokens" in line for line in lines)
    assert any("scored tokens) with label 1 that have weights in all of them" in line for line in lines)
    for pair in (("block", "sequence"), ("block", "token"), ("sequence", "token")):
        row = next(line for line in lines if ", ".join(pair) in line).split()
        assert all(-1 <= float(cell) <= 1 for cell in row if cell[0].isdigit() or cell[0] == "-")
        for kind in ("samples", "tokens"):
            title = f"where {pair[0]} and {pair[1]} disagree most: {kind}"
            start = next(index for index, line in enumerate(lines) if line.startswith(title))
            # The rules of a table and its heading lie between.
            assert all(line.rstrip(" │").endswith(" x") for line in lines[start + 4 : start + 6])


def test_json_keeps_to_its_schema(job, capsys):
    command = [
        "compare",
        "block",
        "token",
        "--samples",
        "3",
        "--format",
        "json",
        "--store",
        str(job / "store"),
    ]
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)
    schema = json.loads((folder("schemas") / "comparison.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(found)
    (pair,) = found["pairs"]
    assert len(pair["samples"]) == len(pair["tokens"]) == 3
    assert 0 < pair["token_rank_correlation"] <= 1
    del pair["tokens"][0]["token"]
    assert list(Draft202012Validator(schema).iter_errors(found))


def test_output_is_ascii_where_programs_read_it(job, capsys):
    assert (
        run(
            [
                "compare",
                "block",
                "token",
                "--samples",
                "50",
                "--format",
                "json",
                "--store",
                str(job / "store"),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.isascii()


def test_a_constant_weighting_has_no_ranks(job, capsys, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(job / "store", store)
    assert run(["weight", "--level", "uniform", "--store", str(store)]) == 0
    capsys.readouterr()
    assert run(["compare", "block", "uniform", "--store", str(store)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "block, uniform" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["block, uniform", "-", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "compare takes two weightings or more (have: token, block, sequence)"),
        (["block"], "compare takes two weightings or more"),
        (["block", "block"], "block is named twice"),
        (["block", "nonsense"], "has no weights/nonsense"),
        (["block", "token", "--samples", "0"], "--samples"),
    ],
)
def test_a_wrong_request_is_one_line(job, capsys, arguments, message):
    assert run(["compare", *arguments, "--store", str(job / "store")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
