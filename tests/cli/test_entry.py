"""The command line as a whole: help, lean imports, exit codes, one-line errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from pear_data.cli.entry import COMMANDS, pear_data, run

HEAVY = ("torch", "transformers", "polars", "duckdb", "vllm", "ray")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom pear_data.cli.entry import run\ncode = run(sys.argv[1:])\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\nsys.exit(repr(heavy) if heavy else code)"
    )
    result = python(code, *arguments)
    assert result.returncode == 0, result.stderr


def test_import_is_lean_and_all_is_what_is_there():
    result = python(
        "import sys, pear_data\n"
        f"assert not [name for name in {(*HEAVY, 'numpy', 'pyarrow')} if name in sys.modules]\n"
        "for name in pear_data.__all__: getattr(pear_data, name)"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    result = CliRunner().invoke(pear_data, [name, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"pear-data {name}" in result.output
    assert f"  {name} " in CliRunner().invoke(pear_data, ["--help"]).output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["wieght"], 2, "No such command 'wieght'"),
        (["weight", "--level", "word"], 2, "'word' is not one of 'token', 'block', 'sequence'"),
        (["weight", "--gamma", "0"], 2, "--gamma: Input should be greater than 0"),
        (["weight", "--name", "../x"], 2, "--name: '../x' is no name"),
        (["weight", "--clip-log-ratio", "1", "0"], 2, "--clip-log-ratio: 1.0 > 0.0"),
        (
            ["weight", "--clip-log-weight", "-inf", "5"],
            2,
            "--clip-log-weight: Input should be a finite number",
        ),
        (["weight", "--clip-log-weight", "0", "89"], 2, "largest float32: lower the upper clip_log_weight"),
        (["weight", "--negative-scale", "inf"], 2, "--negative-scale: Input should be a finite number"),
        (["weight", "--negative-scale", "1e37"], 2, "or negative_scale"),
        (["weight", "--target", "b", "--behavior", "b"], 2, "target and behavior are both 'b'"),
        (["stats", "--store", "/dev/null"], 1, "cannot read /dev/null/manifest.json (Not a directory)"),
        (
            ["ingest", "x", "--tokenizer", "t", "--store", "/dev/null/x"],
            1,
            "cannot write to /dev/null/x (Not a directory)",
        ),
        (["stats", "--store", "a\x1b[2J\x9b31m"], 1, "no store at a[2J31m"),
        (["weight"], 1, "no store at"),
        (["stats"], 1, "no store at"),
        (["verify"], 1, "no store at"),
        (["export", "out"], 1, "no store at"),
        (["score"], 1, "no store at"),
        (["run", "nowhere.yaml"], 2, "no recipe nowhere.yaml"),
        (
            ["run", "demo.yaml", "--set", "weight.gamma=["],
            2,
            "--set weight.gamma=[: the value is not valid YAML",
        ),
        (["ingest", "x.jsonl"], 2, "give --tokenizer"),
    ],
)
def test_errors_are_one_line_with_the_right_code(arguments, code, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_without_a_command_it_shows_the_help(capsys):
    assert run([]) == 2
    assert f"\n  {COMMANDS[0]} " in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["weight", "--debug"], ["--debug", "weight"]):
        assert run(arguments) == 1
        assert "Traceback" in capsys.readouterr().err


def test_options_come_from_the_environment_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PEAR_STORE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PEAR_WEIGHT_GAMMA", "7")
    assert run(["weight"]) == 2
    assert "--gamma" in capsys.readouterr().err
    monkeypatch.setenv("PEAR_WEIGHT_GAMMA", "0.5")
    assert run(["weight"]) == 1
    assert "elsewhere" in capsys.readouterr().err
