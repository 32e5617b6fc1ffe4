"""What an export says for live weights, and what it refuses to say."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from pear_data import open_store
from pear_data.config import ExportSettings, SourceWeighting, WeightSettings
from pear_data.errors import UsageError
from pear_data.loss.live import LivePear
from pear_data.progress import Silent
from pear_data.stages.export import export
from pear_data.stages.weight import weight
from pear_data.store import writable_store


def live_export(folder, out, weights, **settings):
    return export(
        open_store(folder), ExportSettings(out=str(out), weights=weights, live=True, **settings), Silent()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"level": "token", "gamma": 0.9},
        {"level": "block", "block_size": 2, "clip_log_ratio": (-0.2, 0.1), "negative_scale": 0.5},
        {"level": "sequence", "clip_log_weight": (-2.0, 1.0)},
    ],
)
def test_the_hook_reads_the_weighting(folder, tmp_path, settings):
    with writable_store(folder) as store:
        weight(store, WeightSettings(**settings, name="mine"), Silent())
    live_export(folder, tmp_path / "out", "mine")
    assert LivePear.from_export(tmp_path / "out") == LivePear(**settings)


def test_a_uniform_weighting_is_exported_with_the_defaults(folder, tmp_path):
    live_export(folder, tmp_path / "out", "uniform")
    assert LivePear.from_export(tmp_path / "out") == LivePear()
    rows = pq.read_table(tmp_path / "out" / "train-00000.parquet").to_pylist()
    for row in rows:
        np.testing.assert_array_equal(row["loss_weights"], np.array(row["labels"]) != -100)


def test_a_behavior_policy_alone_is_enough(make_store, samples, tmp_path):
    folder = make_store(samples)
    with writable_store(folder) as store:
        del store.manifest.stages["scores/initial"]
        weight(store, WeightSettings(level="uniform", target="behavior", behavior="none"), Silent())
    live_export(folder, tmp_path / "out", "uniform", behavior="behavior")
    rows = pq.read_table(tmp_path / "out" / "train-00000.parquet").to_pylist()
    found = {row["sample_id"]: np.float32(row["behavior_logprobs"]) for row in rows}
    for sample in samples:
        np.testing.assert_array_equal(found[sample.sample_id][sample.loss_mask], sample.behavior)


def test_samples_the_behavior_policy_has_not_scored_stay_out(make_store, samples, tmp_path):
    samples[4].behavior_status = "nonfinite"
    folder = make_store(samples)
    with writable_store(folder) as store:
        weight(store, WeightSettings(level="uniform", behavior="none"), Silent())
    outcome = live_export(folder, tmp_path / "out", "uniform")
    assert "left out: 1 scores/behavior nonfinite" in outcome.summary


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"center": "sample"}, "centered log-ratios"),
        ({"normalize": "corpus"}, "normalised weights"),
        ({"per_source": {"even": SourceWeighting(gamma=0.9)}}, "settings of single sources"),
        ({"level": "dft"}, "level dft"),
        ({"target": "behavior", "behavior": "initial"}, "log-ratios to initial beside those to behavior"),
    ],
)
def test_what_live_weights_cannot_be(folder, tmp_path, settings, reason):
    with writable_store(folder) as store:
        weight(store, WeightSettings(**settings, name="mine"), Silent())
    with pytest.raises(UsageError, match=f"live weights know no .*{reason}"):
        live_export(folder, tmp_path / "out", "mine", behavior="behavior")
    assert not (tmp_path / "out").exists()


def test_log_probs_of_another_tokenizer_are_refused(make_store, samples, tmp_path):
    for sample in samples:
        sample.behavior_spans = np.ones(len(sample.behavior), dtype=np.int32)
    folder = make_store(samples)
    with writable_store(folder) as store:
        weight(store, WeightSettings(), Silent())
    with pytest.raises(UsageError, match="another tokenizer"):
        live_export(folder, tmp_path / "out", "block")
