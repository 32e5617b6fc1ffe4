"""The plan: what it counts against the corpus itself, what it times against a source of known speed."""

from __future__ import annotations

import contextlib
import hashlib
import shutil

import numpy as np
import pytest

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.config import ScoreSettings
from pear_data.demo import asset
from pear_data.errors import UsageError
from pear_data.progress import Silent
from pear_data.schema import STATUS_OK
from pear_data.stages.calibration import calibrate
from pear_data.stages.plan import plan_scoring
from pear_data.stages.plan_text import plan_table
from pear_data.stages.score import score
from pear_data.stages.sources import GroupScores, PolicySource
from pear_data.store import writable_store

SAMPLES = 40


@pytest.fixture
def folder(ingested, tmp_path):
    return shutil.copytree(ingested, tmp_path / "store")


@pytest.fixture
def plan(folder, source_of, monkeypatch):
    """`plan(**settings)`: of the bundled initial policy, with its engine in this process."""

    @contextlib.contextmanager
    def open_here(store, settings, progress):
        yield source_of("initial", settings.dtype, settings.max_length)

    monkeypatch.setattr("pear_data.stages.plan.open_source", open_here)

    def make(**settings):
        chosen = {"model": str(asset("initial")), "dtype": "float32"} | settings
        return plan_scoring(open_store(folder), ScoreSettings(**chosen), Silent())

    return make


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in files}


def shown(capsys):
    """Label and value of each row of the table, and what was said beside it."""
    captured = capsys.readouterr()
    rows = [line.split("│")[1:3] for line in captured.out.splitlines() if "│" in line]
    return {label.strip(): value.strip() for label, value in rows}, captured.err


def test_what_a_user_sees(folder, capsys):
    before = contents(folder)
    capsys.readouterr()
    model = ["--model", "bundled:initial", "--engine", "transformers", "--dtype", "float32"]
    assert run(["score", *model, "--dry-run", "--store", str(folder)]) == 0
    rows, said = shown(capsys)
    corpus = open_store(folder).corpus.to_table()
    lengths, scored = corpus["num_tokens"].to_numpy(), corpus["num_scored"].to_numpy()
    assert rows["samples"] == str(SAMPLES)
    assert rows["tokens"] == f"{lengths.sum():,}"
    assert rows["scored tokens"] == f"{scored.sum():,} ({100 * scored.sum() / lengths.sum():.0f} %)"
    assert rows["longest sample"] == f"{lengths.max()} tokens"
    assert rows["too long to score"] == "0 samples, of more than 2,048 tokens"
    assert rows["left to score"] == f"3 of 3 shards, {lengths.sum():,} tokens"
    assert rows["engine"].endswith("float32 on cpu")
    assert rows["parameters"].startswith("840,960 (layers 788,608, embedding 52,352, which is the head too)")
    assert "weights 3.36 MB" in rows["memory"]
    assert "tokens/s" in rows["speed"]
    assert rows["time"].endswith("with 1 worker")
    assert rows["disk space"] == f"{(4 * scored.sum() + 40 * SAMPLES) / 1000:.3g} kB at most"
    assert "Scoring with transformers, as asked." in said
    assert contents(folder) == before


def test_counts_leave_out_what_is_too_long_or_done(folder, plan, source_of):
    corpus = open_store(folder).corpus.to_table()
    lengths, scored = corpus["num_tokens"].to_numpy(), corpus["num_scored"].to_numpy()
    limit = int(np.median(lengths))
    fits = lengths <= limit
    found = plan(max_length=limit)
    assert (found.whole.samples, found.whole.too_long) == (SAMPLES, (~fits).sum())
    assert found.left.run_tokens == lengths[fits].sum()
    assert found.left.longest_run == lengths[fits].max()
    assert found.left.forward_passes == np.ceil(lengths[fits].sum() / found.forward_tokens)
    by_hand = 2 * (788_608 - 9 * 128 - 4 * 256) * lengths[fits].sum()  # 9 norms, query, key and value biases
    assert found.left.flops.body == by_hand
    assert found.left.flops.head == 2 * 409 * 128 * scored[fits].sum()
    assert found.left.flops.attention == 2 * 4 * 256 * (lengths * (lengths + 1.0) / 2)[fits].sum()

    with writable_store(folder) as store:
        score(store, ScoreSettings(model="initial"), source_of("initial"), Silent())
    done = plan()
    assert (done.shards, done.shards_left, done.left.run_tokens, done.seconds) == (3, 0, 0, 0)
    assert done.whole.tokens == lengths.sum()
    assert done.differences == []
    (folder / "scores" / "initial" / "part-00001.parquet").unlink()
    rest = plan()
    assert rest.shards_left == 1
    assert 0 < rest.left.tokens < lengths.sum()


def test_log_probs_made_with_other_settings_are_named(folder, plan, source_of, capsys):
    with writable_store(folder) as store:
        score(store, ScoreSettings(model="initial"), source_of("initial"), Silent())
    other = ["--model", str(asset("initial")), "--dtype", "bfloat16", "--dry-run", "--store", str(folder)]
    capsys.readouterr()
    assert run(["score", *other]) == 0
    rows, said = shown(capsys)
    assert 'dtype: was "float32", now "bfloat16"' in said
    assert rows["left to score"].startswith("3 of 3 shards")
    assert run(["score", *other, "--overwrite"]) == 0
    assert "other settings" not in shown(capsys)[1]


def test_without_a_corpus_or_a_model_there_is_nothing_to_plan(folder, plan, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    arguments = ["--model", "bundled:initial", "--dry-run", "--store"]
    assert run(["score", "corpus.jsonl", *arguments, str(nowhere)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"`pear-data ingest corpus.jsonl --tokenizer bundled:initial --store {nowhere}`" in error
    assert not nowhere.exists()
    with writable_store(tmp_path / "empty", create=True):
        pass
    assert run(["score", *arguments, str(tmp_path / "empty")]) == 2
    assert "pear-data ingest CORPUS" in capsys.readouterr().err
    with pytest.raises(UsageError, match="give --model"):
        plan(model=None)
    assert run(["score", "corpus.jsonl", *arguments, str(folder), "--dtype", "float32"]) == 0
    assert "corpus.jsonl is not read" in capsys.readouterr().err


def test_workers_share_the_cores_of_a_machine_without_gpus(plan):
    def time_row(**settings):
        columns = [list(column.cells) for column in plan_table(plan(**settings)).columns]
        return dict(zip(*columns, strict=True))["time"]

    assert time_row(workers=2).endswith("2 workers, which share this machine's cores")
    assert time_row(workers=2, runner="ray").endswith("with 2 workers")
    # More than there are shards: they share the batches of one.
    assert time_row(workers=9, runner="ray").endswith("with 9 workers")


@pytest.fixture
def source_of_speed(monkeypatch):
    """`source_of_speed(tokens_per_second, warm_up)`: a source and its calls; the clock shows what a call would take.

    Its first call takes `warm_up` seconds more.
    """
    clock = 0.0
    monkeypatch.setattr("pear_data.stages.calibration.perf_counter", lambda: clock)

    def make(tokens_per_second, warm_up=0.0):
        calls = []

        def score_group(batch, records, on_tokens):
            nonlocal clock
            assert records["sample_id"].to_pylist() == batch.sample_ids
            clock += batch.num_tokens.sum() / tokens_per_second + (0 if calls else warm_up)
            calls.append(batch.sample_ids)
            scored = int(batch.loss_mask.sum())
            return GroupScores(np.zeros(scored, np.float32), np.full(len(batch), STATUS_OK, dtype=object))

        return PolicySource({}, score_group, ("record",)), calls

    return make


def test_calibration_leaves_out_the_warm_up_and_uses_each_sample_once(folder, source_of_speed):
    source, calls = source_of_speed(20_000, warm_up=5)
    found = calibrate(open_store(folder), source, 2048)
    assert found.tokens_per_second == pytest.approx(20_000)
    scored = [sample_id for call in calls for sample_id in call]
    assert len(scored) == len(set(scored)) == SAMPLES


@pytest.mark.parametrize("speed", [20, 800, 1500])
def test_calibration_of_a_slow_engine_ends_in_seconds(folder, source_of_speed, speed):
    source, calls = source_of_speed(speed)
    found = calibrate(open_store(folder), source, 2048)
    assert found.tokens_per_second == pytest.approx(speed)
    longest = max(open_store(folder).corpus.to_table()["num_tokens"].to_pylist())
    # A run ends with the sample that is under way.
    assert 1 <= found.seconds <= 6 + longest / speed
    assert len(calls) <= 4


def test_calibration_takes_only_samples_that_fit(folder, source_of_speed):
    store = open_store(folder)
    lengths = store.corpus.to_table()["num_tokens"].to_pylist()
    source, calls = source_of_speed(1e6)
    assert calibrate(store, source, min(lengths) - 1) is None
    assert calls == []
    assert set(calibrate(store, source, min(lengths)).num_tokens) == {min(lengths)}
