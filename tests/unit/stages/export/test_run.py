"""An export as a whole: its manifest, its folder, what stops it half way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import datasets
import numpy as np
import pytest

from pear_data import open_store
from pear_data.config import ExportSettings, WeightSettings
from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.progress import Silent
from pear_data.stages.export import export
from pear_data.stages.weight import weight
from pear_data.store import commit, writable_store
from pear_data.store.lock import exclusive


@pytest.fixture
def folder(make_store, samples):
    samples[5].label = -1
    samples[9].initial_status = "too_long"
    folder = make_store(samples)
    with writable_store(folder) as store:
        weight(store, WeightSettings(level="token"), Silent())
        weight(store, WeightSettings(level="block"), Silent())
    return folder


def run(folder, out, weights="token", **settings):
    return export(open_store(folder), ExportSettings(out=str(out), weights=weights, **settings), Silent())


def test_each_weight_stands_at_its_label(folder, samples, tmp_path):
    outcome = run(folder, tmp_path / "out")
    assert "left out: 1 dropped, 1 unscored" in outcome.summary
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    kept = [sample for index, sample in enumerate(samples) if index not in (5, 9)]
    assert loaded["sample_id"][:] == [sample.sample_id for sample in kept]
    stored = {
        row["sample_id"]: row["weights"] for row in open_store(folder).weights["token"].to_table().to_pylist()
    }
    for row, sample in zip(loaded, kept, strict=True):
        assert row["input_ids"] == sample.input_ids.tolist()
        assert row["attention_mask"] == [1] * len(sample.input_ids)
        assert row["labels"] == np.where(sample.loss_mask, sample.input_ids, -100).tolist()
        weights = np.array(row["loss_weights"], dtype=np.float32)
        np.testing.assert_array_equal(weights[sample.loss_mask], np.float32(stored[sample.sample_id]))
        assert not weights[~sample.loss_mask].any()
        assert weights[0] == 0
    assert str(loaded.features["loss_weights"]) == "List(Value('float32'))"


def test_the_manifest_tells_a_trainer_what_it_needs(folder, samples, tmp_path):
    run(folder, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "pear_export.json").read_text())
    kept = [sample for index, sample in enumerate(samples) if index not in (5, 9)]
    weights = [row["weights"] for row in open_store(folder).weights["token"].to_table().to_pylist()]
    flat = np.concatenate([w for index, w in enumerate(weights) if index not in (5, 9)])
    assert manifest["mean_weight"] == pytest.approx(flat.mean())
    assert manifest["samples"] == len(kept)
    assert manifest["num_scored"] == len(flat)
    assert manifest["num_tokens"] == sum(len(sample.input_ids) for sample in kept)
    assert manifest["left_out"] == {"dropped": 1, "unscored": 1}
    assert manifest["weighting_settings"]["level"] == "token"


def test_again_is_nothing_other_weights_are_refused_other_folders_are_safe(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, out)
    assert "nothing to do" in run(folder, out).summary
    with pytest.raises(MismatchError, match='weighting: was "token", now "block"'):
        run(folder, out, "block")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="no export of ours"):
        run(folder, tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    run(folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "pear_export.json").exists()


def test_a_killed_export_leaves_nothing_at_its_place_and_is_done_again(folder, tmp_path):
    partial = tmp_path / ".out.pear_export"
    partial.mkdir()
    (partial / "train-00009.parquet").write_bytes(b"half")
    run(folder, tmp_path / "out", shard_tokens=120)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "pear_export.json",
        "train-00000.parquet",
        "train-00001.parquet",
        "train-00002.parquet",
    ]
    assert not partial.exists()


def test_an_export_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    writes = []

    def fail_at_the_third(what, path):
        if what == "sync":
            writes.append(path)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(commit, "on_operation", fail_at_the_third)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PearError, match="No space left on device"):
        run(folder, tmp_path / "out", shard_tokens=120)
    assert len(writes) == 3
    assert sorted(tmp_path.iterdir()) == before


def test_two_exports_to_one_place_do_not_meet(folder, tmp_path):
    with (
        exclusive(tmp_path / ".out.pear_export"),
        pytest.raises(PearError, match="is being written by process"),
    ):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_export_is_an_error(make_store, samples, tmp_path):
    for sample in samples:
        sample.label = -1
    folder = make_store(samples, "negatives")
    with writable_store(folder) as store:
        weight(store, WeightSettings(), Silent())
    with pytest.raises(UsageError, match="no sample to export"):
        run(folder, tmp_path / "out", "block")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["corpus", "weights/token", "scores/behavior"])
def test_damage_in_the_store_is_not_exported(folder, tmp_path, key):
    path = sorted((folder / key).glob("part-*.parquet"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(MismatchError, match=r"does not match its sha256"):
        run(folder, tmp_path / "out", live=True)
    assert not (tmp_path / "out").exists()


def test_a_damaged_summary_chooses_nothing(folder, tmp_path):
    path = sorted((folder / "summary" / "weights" / "token").glob("part-00000.parquet"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(MismatchError, match=r"does not match its sha256"):
        run(folder, tmp_path / "out", where="weight_mean > 0.5")


KILLED = """
import os, signal, sys
from pear_data import open_store
from pear_data.config import ExportSettings
from pear_data.progress import Silent
from pear_data.stages.export import export
from pear_data.store import commit

left = int(sys.argv[3])
def die(what, path):
    global left
    left -= what == "sync"
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
commit.on_operation = die
export(open_store(sys.argv[1]), ExportSettings(out=sys.argv[2], weights="token", shard_tokens=120), Silent())
"""


@pytest.mark.parametrize("write", [1, 3, 4])
def test_killed_at_a_write_and_run_again(folder, tmp_path, write):
    """Writes 1 to 3 are files, write 4 is the manifest."""
    run(folder, tmp_path / "whole", shard_tokens=120)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out"), str(write)], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    run(folder, tmp_path / "out", shard_tokens=120)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }
    assert not (tmp_path / ".out.pear_export").exists()
