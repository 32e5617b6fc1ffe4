"""`pear-data quarantine` on real models: list, mend, score the new rows alone."""

from __future__ import annotations

import json

from pear_data.cli.entry import run
from pear_data.demo import asset
from pear_data.store import open_store

TURNS = [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": "5"}]


def test_a_rejected_row_is_listed_mended_scored_and_weighted(tmp_path, capsys):
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(json.dumps({"messages": TURNS}).encode() + b'\n{"messages": "\x1b[2J\xff"}\n{}\n')
    store = ["--store", str(tmp_path / "store")]
    score = ["score", "--model", str(asset("initial")), "--engine", "transformers", *store]
    weight = ["weight", "--level", "dft", *store]
    assert run([score[0], str(corpus), *score[1:]]) == 3
    assert run(weight) == 0
    capsys.readouterr()
    assert run(["quarantine", "list", *store]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["row"] for line in shown.out.splitlines()] == [2, 3]
    assert "\x1b" not in shown.out
    assert shown.err == "2 rows in quarantine: 2 of corpus\n"
    mended = tmp_path / "mended.jsonl"
    assert run(["quarantine", "list", "-o", str(mended), *store]) == 0
    rows = [json.loads(line) | {"raw": {"messages": TURNS}} for line in mended.read_text().splitlines()]
    mended.write_text("\n".join(map(json.dumps, rows)))
    assert run(["quarantine", "retry", str(mended), *store]) == 0
    assert run(["stats", *store]) == 2
    assert "is not finished (1 of 2 shards): run the command that makes it again" in capsys.readouterr().err
    assert run(score) == 0
    assert run(weight) == 0
    assert run(["verify", *store]) == 0
    assert run(["quarantine", "retry", "--model", str(asset("initial")), *store]) == 0
    assert "no sample to score again" in capsys.readouterr().err
    assert open_store(tmp_path / "store").sql("select count(*) n from samples").to_pylist() == [{"n": 3}]


def test_what_to_retry_is_asked_for(tmp_path, capsys):
    assert run(["quarantine", "retry", "--store", str(tmp_path)]) == 2
    assert "give a file of mended rows, or --model M" in capsys.readouterr().err
    assert run(["quarantine", "retry", "x", "--model", "m", "--store", str(tmp_path)]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert run(["quarantine"]) == 2
    assert "retry" in capsys.readouterr().err
