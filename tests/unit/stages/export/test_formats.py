"""Each format's rows against the store, sample by sample."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from pydantic import ValidationError

from pear_data.config import ExportSettings, WeightSettings
from pear_data.errors import PearError, UsageError
from pear_data.progress import Silent
from pear_data.stages.export import export
from pear_data.stages.export.formats import format_of
from pear_data.stages.weight import weight
from pear_data.store import open_store, writable_store


def same(found, wanted):
    np.testing.assert_array_equal(np.float32(found), wanted)
    np.testing.assert_array_equal(np.float64(found), np.float64(wanted))


def test_hf_and_live(exported, expected, tmp_path):
    _, manifest, rows = exported("hf", "block", live=True)
    wanted = expected("block")
    assert [row["sample_id"] for row in rows["train"]] == list(wanted)
    for row in rows["train"]:
        ids, scored, weights, behavior = wanted[row["sample_id"]]
        assert row["input_ids"] == ids.tolist()
        assert row["labels"] == np.where(scored, ids, -100).tolist()
        assert row["attention_mask"] == [1] * len(ids)
        same(row["loss_weights"], weights)
        same(row["behavior_logprobs"], behavior)
    assert manifest["live"] == {
        "behavior": "behavior",
        "level": "block",
        "block_size": 4,
        "gamma": 0.999,
        "clip_log_ratio": [-0.08, 0.3],
        "clip_log_weight": [-10.0, 5.0],
        "negative_scale": 0.0,
    }
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert str(loaded.features["behavior_logprobs"]) == "List(Value('float32'))"


def test_verl(exported, expected):
    _, manifest, rows = exported("verl")
    for row, (name, (ids, _, weights, _)) in zip(rows["train"], expected().items(), strict=True):
        assert set(row) == {"sample_id", "source", "input_ids", "loss_weights"}
        assert (row["sample_id"], row["input_ids"]) == (name, ids.tolist())
        same(row["loss_weights"], weights)
    assert "sum(loss_weights)" in manifest["normaliser"]


def test_shifted_weighs_the_next_token(exported, expected):
    summary, _, rows = exported("shifted")
    for row, (name, (ids, _, weights, _)) in zip(rows["train"], expected().items(), strict=True):
        assert (row["sample_id"], row["input_ids"]) == (name, ids.tolist())
        same(row["loss_weights"], [*weights[1:], 0])
    assert "prebuilt" in summary


def test_shifted_rows_of_one_length(exported, expected):
    """Cut after `max_length` tokens or filled up to it: the last that is left predicts nothing."""
    _, manifest, rows = exported("shifted", max_length=30)
    wanted = expected()
    assert {len(ids) > 30 for ids, *_ in wanted.values()} == {False, True}
    for row in rows["train"]:
        ids, _, weights, _ = wanted[row["sample_id"]]
        filler = [0] * (30 - len(ids))
        assert row["input_ids"] == [*ids[:30].tolist(), *filler]
        same(row["loss_weights"], [*weights[1:30], 0, *filler])
    assert manifest["num_tokens"] == sum(min(len(wanted[row["sample_id"]][0]), 30) for row in rows["train"])


@pytest.mark.parametrize("max_length", [16, 40, 1000])
def test_packs_hold_every_sample_once(exported, expected, max_length):
    summary, manifest, rows = exported("hf-packed", max_length=max_length)
    wanted = expected()
    left = {
        name: [column[:max_length] for column in columns]
        for name, columns in wanted.items()
        if columns[1][:max_length].any()
    }
    seen = []
    for pack in rows["train"]:
        assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) <= max_length
        start = 0
        for name, length in zip(pack["sample_ids"], pack["seq_lengths"], strict=True):
            part = slice(start, start + length)
            ids, scored, weights, _ = left[name]
            assert pack["input_ids"][part] == ids.tolist()
            assert pack["labels"][part] == np.where(scored, ids, -100).tolist()
            assert pack["position_ids"][part] == list(range(length))
            same(pack["loss_weights"][part], weights)
            seen.append(name)
            start += length
    assert sorted(seen) == sorted(left)
    cut = [name for name in left if len(wanted[name][0]) > max_length]
    assert manifest["cut"] == len(cut)
    assert manifest["cut_tokens"] == sum(len(wanted[name][0]) - max_length for name in cut)
    lost = len(wanted) - len(left)
    assert manifest["left_out"].get("nothing_scored_within_max_length", 0) == lost
    assert (f"cut to {max_length:,} tokens: {len(cut)} samples" in summary) == bool(cut)


def test_hf_cut_to_length_keeps_the_first_tokens(exported, expected):
    _, manifest, rows = exported("hf", max_length=10)
    wanted = expected()
    for row in rows["train"]:
        assert row["input_ids"] == wanted[row["sample_id"]][0][:10].tolist()
        same(row["loss_weights"], wanted[row["sample_id"]][2][:10])
    assert manifest["num_tokens"] == sum(len(row["input_ids"]) for row in rows["train"])


def test_live_samples_are_whole(exported, expected):
    """A cut sample's live weights would lack the log-ratios of what was cut."""
    _, manifest, rows = exported("hf-packed", live=True, max_length=20)
    wanted = {name: columns for name, columns in expected().items() if len(columns[0]) <= 20}
    assert sorted(name for pack in rows["train"] for name in pack["sample_ids"]) == sorted(wanted)
    assert manifest["left_out"]["longer_than_max_length"] == len(expected()) - len(wanted)
    for pack in rows["train"]:
        same(pack["behavior_logprobs"], np.concatenate([wanted[name][3] for name in pack["sample_ids"]]))


@pytest.mark.parametrize("form", ["hf", "hf-packed", "verl", "shifted"])
def test_files_are_filled_to_their_size(exported, expected, form):
    settings = {"max_length": 64} if form == "hf-packed" else {}
    _, manifest, rows = exported(form, shard_tokens=100, **settings)
    assert sum(file["rows"] for file in manifest["files"]) == len(rows["train"])
    names = [file["name"].split(".")[0] for file in manifest["files"]]
    assert names == [f"train-{number:05d}" for number in range(len(names))]
    lengths = [len(columns[0]) for columns in expected().values()]
    files, filled = 1, 0
    for length in lengths:
        files += filled >= 100
        filled = length if filled >= 100 else filled + length
    assert len(names) == files > 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"format": "slime"}, "slime casts loss masks to integers"),
        ({"format": "Megatron_Bridge"}, "LongTensor"),
        ({"format": "areal"}, "booleans"),
        ({"format": "prime-rl"}, "booleans"),
        ({"format": "TRL"}, "takes --format hf"),
        ({"format": "ms-swift"}, "takes --format swift"),
        ({"format": "llama-factory"}, "sequence-level"),
        ({"format": "parquet"}, "is no format: give one of hf,"),
        ({"format": "hf-packed"}, "needs max_length"),
        ({"format": "swift", "max_length": 9}, "does not go with format swift"),
        ({"format": "verl", "live": True}, "live goes with format hf or hf-packed"),
        ({"behavior": "teacher"}, "behavior goes with live"),
        ({"eval_fraction": 1.0}, "less than 1"),
        ({"where": ""}, "at least 1 character"),
    ],
)
def test_what_cannot_be_asked_for(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        ExportSettings(out="out", **settings)


def test_messages_are_for_weights_of_samples(folder):
    settings = ExportSettings(out="out", weights="token", format="messages")
    with pytest.raises(UsageError, match="of level token, and format messages has one weight a sample"):
        format_of(open_store(folder), settings)


def test_negatives_are_refused_where_the_sum_of_weights_divides(make_store, samples, tmp_path):
    samples[3].label = -1
    folder = make_store(samples, "negatives")
    with writable_store(folder) as store:
        weight(store, WeightSettings(level="block", negative_scale=0.5), Silent())
    store = open_store(folder)
    with pytest.raises(PearError, match="sample 's3' has a weight of -"):
        export(store, ExportSettings(out=str(tmp_path / "verl"), format="verl"), Silent())
    assert not (tmp_path / "verl").exists()
    export(store, ExportSettings(out=str(tmp_path / "hf")), Silent())
    only = ExportSettings(out=str(tmp_path / "verl"), format="verl", where="label = 1")
    assert "1 where" in export(store, only, Silent()).summary
