"""A manifest somebody else wrote: whatever it says, no path leads out of the store, and the refusal is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pear_data.cli.entry import run
from pear_data.errors import MismatchError, PearError
from pear_data.store import open_store, writable_store

GOLDEN = Path(__file__).parent.parent / "contract" / "stores" / "v2"
PATHS = (
    "../../etc/passwd",
    "/etc/passwd",
    "corpus/../../secret.parquet",
    "..",
    ".",
    "",
    "corpus//part-00000.parquet",
    "./corpus/part-00000.parquet",
    "corpus/",
    "corpus/part-00000.parquet\0.txt",
)
NAMES = (
    "../part-00000",
    "/tmp/x",
    "a/b",
    "",
    ".",
    "..",
    ".hidden",
    "a\nb",
    "a\0b",
    "part-00000\n",
    "\x1b[2J",
)


@pytest.fixture
def store(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "store")


def _change(store, change):
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _paths(manifest):
    corpus = manifest["stages"]["corpus"]["shards"][0]
    weights = manifest["stages"]["weights/block"]["shards"][1]
    return [
        corpus["file"],
        corpus["quarantine"],
        weights["summary"],
        weights["totals"],
        manifest["tokenizer"]["vocabulary"],
    ]


@pytest.mark.parametrize("path", PATHS)
def test_no_file_outside_is_named(store, path):
    for which in range(5):
        _change(store, lambda manifest, which=which: _paths(manifest)[which].update(path=path))
        with pytest.raises(MismatchError, match=r"is no path inside a store\): restore it") as refusal:
            open_store(store)
        assert len(str(refusal.value).splitlines()) == 1
        shutil.copy(GOLDEN / "manifest.json", store)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_becomes_a_path(store, name):
    def rename_shard(manifest):
        manifest["stages"]["weights/block"]["shards"][0]["name"] = name

    def rename_stage(manifest):
        manifest["stages"][f"weights/{name}"] = manifest["stages"].pop("weights/block")

    for change in (rename_shard, rename_stage):
        _change(store, change)
        with pytest.raises(MismatchError, match="not a readable manifest"):
            open_store(store)
        shutil.copy(GOLDEN / "manifest.json", store)


def _text(**fields):
    return json.dumps(json.loads((GOLDEN / "manifest.json").read_text()) | fields)


TEXTS = {
    "nothing": "",
    "no JSON": "{",
    "null": "null",
    "a list": "[]",
    "a number": "1",
    "deep": "[" * 200_000 + "]" * 200_000,
    "deep settings": '{"format_version": 2, "created_by": "", "stages": '
    + '{"a":' * 50_000
    + "1"
    + "}" * 50_000
    + "}",
    "a huge number": '{"format_version": 1' + "0" * 10_000 + "}",
    "a huge float": _text(format_version=1e300),
    "a version of no kind": _text(format_version="two"),
    "a fraction": _text(format_version=1.5),
    "version 0": _text(format_version=0),
    "a negative version": _text(format_version=-3),
    "NaN": _text(format_version=float("nan")),
    "Infinity": _text(format_version=float("inf")),
    "no version": _text(format_version=None),
    "stages that are a list": _text(stages=[]),
    "stages that are text": _text(stages="corpus"),
    "a stage that is null": _text(stages={"corpus": None}),
    "a tokenizer that is text": _text(tokenizer="x"),
    "a field nobody knows": _text(execute="rm -rf /"),
    "no UTF-8": "\udcff",
    "a lone surrogate": '{"format_version": 2, "created_by": "\\ud800"}',
}


@pytest.mark.parametrize("kind", TEXTS)
def test_what_is_no_manifest_is_one_line(store, kind, capsys):
    text = TEXTS[kind]
    (store / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    for command in (["verify"], ["sql", "select 1"], ["weight"], ["migrate"]):
        assert run([*command, "--store", str(store)]) in (1, 4), command
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("Error: ")
        assert shown.err.count("\n") == 1
        assert "--debug" not in shown.err


def test_links_that_lead_out_are_neither_read_nor_written_through(store, tmp_path, capsys):
    part = store / "corpus" / "part-00000.parquet"
    shutil.copy(part, tmp_path / "outside.parquet")
    part.unlink()
    part.symlink_to(tmp_path / "outside.parquet")
    for command in (["sql", "from corpus"], ["verify"], ["export", str(tmp_path / "out")]):
        assert run([*command, "--store", str(store)]) == 4, command
        assert "link that leads out of the store" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    shutil.rmtree(store)
    shutil.copytree(GOLDEN, store)
    shutil.move(store / "weights", tmp_path / "elsewhere")
    (store / "weights").symlink_to(tmp_path / "elsewhere")
    before = sorted(path.name for path in (tmp_path / "elsewhere").rglob("*"))
    with pytest.raises(PearError, match="weights is a link that leads out"), writable_store(store):
        pass
    assert sorted(path.name for path in (tmp_path / "elsewhere").rglob("*")) == before


def test_a_link_to_a_store_and_links_inside_are_followed(store, tmp_path):
    (tmp_path / "link").symlink_to(store)
    part = store / "corpus" / "part-00000.parquet"
    part.rename(store / "corpus" / "moved.parquet")
    part.symlink_to("moved.parquet")
    assert run(["verify", "--store", str(tmp_path / "link")]) == 0
    with writable_store(tmp_path / "link"):
        pass
