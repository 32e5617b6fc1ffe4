"""`demo` and `run pipelines/demo.yaml`: the whole job on bundled parts."""

from __future__ import annotations

import json

from pear_data import open_store
from pear_data.cli.entry import run


def test_demo_ends_with_a_table_commands_and_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "here"]) == 0
    captured = capsys.readouterr()
    for text in ("token", "block", "sequence", "effective", "pear-data stats", "here/report.html"):
        assert text in captured.out
    store = open_store("here/store")
    assert list(store.weights) == ["token", "block", "sequence"]
    samples = store.corpus.count_rows()
    assert samples >= 300
    assert (tmp_path / "here" / "report.html").read_text().startswith("<!doctype html>")
    manifest = json.loads((tmp_path / "here" / "export" / "pear_export.json").read_text())
    assert manifest["samples"] + manifest["left_out"]["dropped"] == samples
    assert run(["demo", "here"]) == 0
    assert "already holds this export" in capsys.readouterr().err


def test_run_the_bundled_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["run", "pipelines/demo.yaml", "--set", "ingest.limit=20"]) == 0
    assert open_store("pear_demo/store").corpus.count_rows() == 20
    assert (tmp_path / "pear_demo" / "report.html").exists()
    assert (tmp_path / "pear_demo" / "export" / "pear_export.json").exists()
