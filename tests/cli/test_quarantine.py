"""`pear-data quarantine` on real models: list, mend, score the new rows alone."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from pear_data.cli.entry import run
from pear_data.demo import asset
from pear_data.schema import SCORES
from pear_data.stages.score_shard import write_scores
from pear_data.store import open_store, writable_store

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


def test_a_failed_sample_is_scored_again_by_the_same_engine(tmp_path, capsys):
    folder = tmp_path / "store"
    model = ["--model", str(asset("initial")), "--engine", "transformers", "--store", str(folder)]
    assert run(["score", str(asset("corpus")), "--limit", "6", *model]) == 0
    whole = open_store(folder).scores["initial"].to_table()
    with writable_store(folder) as store:
        (shard,) = store.stage("corpus").shards
        ok = whole["status"].to_pylist()
        values = whole.to_pylist()
        values[2] |= {"logprobs": None, "logprob_sum": None, "status": "failed"}
        spoilt = pa.Table.from_pylist(values, schema=SCORES)
        entry, _ = write_scores(store, "scores/initial", shard, [(spoilt, {2: "out of memory"})])
        store.commit("scores/initial", entry)
    assert run(["quarantine", "list", "--store", str(folder)]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["stage"], row["row"], row["reason"]) == ("scores/initial", 3, "out of memory")
    assert row["sample_id"] == values[2]["sample_id"]
    assert run(["quarantine", "retry", "--dtype", "bfloat16", *model]) == 4
    assert "dtype: was " in capsys.readouterr().err
    assert run(["quarantine", "retry", *model]) == 0
    assert "1 of 1 samples are scored now" in capsys.readouterr().err
    again = open_store(folder).scores["initial"].to_table()
    assert again["status"].to_pylist() == ok
    for one, other in zip(again["logprobs"].to_pylist(), whole["logprobs"].to_pylist(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
