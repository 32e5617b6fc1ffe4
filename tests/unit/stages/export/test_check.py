"""`--check` names the row at fault: every rule broken on purpose, in every format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.progress import Silent
from pear_data.stages.export import check_export
from pear_data.stages.export.swift import swift_fault


def check(folder):
    return check_export(Path(folder), Silent()).summary


def rewrite(folder, change):
    """Change the rows of an export's first file, and its checksum with them."""
    path = folder / json.loads((folder / "pear_export.json").read_text())["files"][0]["name"]
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        rows = table.to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((folder / "pear_export.json").read_text())
    manifest["files"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "pear_export.json").write_text(json.dumps(manifest))
    return rows


def first_scored(row):
    return next(i for i, label in enumerate(row["labels"]) if label != -100)


def unscored(row):
    return next(i for i, label in enumerate(row["labels"]) if label == -100 and i)


def put(name, place, value):
    def change(rows):
        row = rows[2]
        row[name][place(row) if callable(place) else place] = value(row) if callable(value) else value

    return change


HF = [
    (lambda rows: rows[2]["loss_weights"].append(0.0), "not as many loss_weights as input_ids"),
    (lambda rows: rows[2]["labels"].pop(), "not as many labels"),
    (put("loss_weights", first_scored, float("nan")), "not finite"),
    (put("loss_weights", first_scored, float("inf")), "not finite"),
    (put("loss_weights", 0, 0.5), "first token of a sample has a weight"),
    (put("loss_weights", unscored, 0.5), "a weight where the label is -100"),
    (put("labels", first_scored, 49_999), "neither -100 nor its token"),
    (put("input_ids", 1, -3), "an id is negative"),
    (put("behavior_logprobs", first_scored, float("nan")), "log-prob is no number"),
    (put("behavior_logprobs", unscored, -1.0), "log-prob where the label is -100"),
]


@pytest.mark.parametrize(("change", "reason"), HF)
def test_hf(exported, tmp_path, change, reason):
    exported("hf", live=True)
    assert "every one sound" in check(tmp_path / "out")
    rows = rewrite(tmp_path / "out", change)
    with pytest.raises(PearError, match=reason) as caught:
        check(tmp_path / "out")
    assert f"sample {rows[2]['sample_id']!r}" in str(caught.value)
    assert caught.value.exit_code == 1


PACKS = [
    (put("seq_lengths", 0, 1), "seq_lengths do not sum"),
    (lambda rows: rows[2]["sample_ids"].append("x"), "not as many sample_ids"),
    (put("position_ids", 1, 7), "position_ids do not count from 0"),
    (put("position_ids", lambda row: row["seq_lengths"][0], 1), "position_ids do not count from 0"),
    (put("loss_weights", lambda row: row["seq_lengths"][0], 0.5), "first token of a sample has a weight"),
    (
        put("labels", lambda row: row["seq_lengths"][0], lambda row: row["input_ids"][row["seq_lengths"][0]]),
        "label",
    ),
]


@pytest.mark.parametrize(("change", "reason"), PACKS)
def test_packs(exported, tmp_path, change, reason):
    exported("hf-packed", max_length=60)
    rows = rewrite(tmp_path / "out", change)
    with pytest.raises(PearError, match=reason) as caught:
        check(tmp_path / "out")
    assert any(repr(name) in str(caught.value) for name in rows[2]["sample_ids"])


def test_a_pack_longer_than_promised(exported, tmp_path):
    exported("hf-packed", max_length=60)
    manifest = json.loads((tmp_path / "out" / "pear_export.json").read_text())
    (tmp_path / "out" / "pear_export.json").write_text(json.dumps({**manifest, "max_length": 50}))
    with pytest.raises(PearError, match="more tokens than the 50 of max_length"):
        check(tmp_path / "out")


SHIFTED = [
    (lambda rows: rows[2]["loss_weights"].append(0.0), "weights for"),
    (put("loss_weights", -1, 0.5), "the last weight is 0.5"),
    (put("loss_weights", 0, 0.1), "no float32, so the trainer would cast it"),
    (put("loss_weights", 0, float("nan")), "not finite"),
    (put("input_ids", 0, 1.5), "no token id"),
    (lambda rows: rows[2].pop("loss_weights"), "KeyError"),
]


@pytest.mark.parametrize(("change", "reason"), SHIFTED)
def test_shifted(exported, tmp_path, change, reason):
    exported("shifted")
    rewrite(tmp_path / "out", change)
    with pytest.raises(PearError, match=f"line 3: .*{reason}"):
        check(tmp_path / "out")


def test_shifted_rows_of_other_lengths(exported, tmp_path):
    exported("shifted", max_length=60)
    rewrite(tmp_path / "out", lambda rows: [rows[2][name].pop() for name in ("input_ids", "loss_weights")])
    with pytest.raises(PearError, match="line 3: sample .*: 59 tokens, and rows are filled up to 60"):
        check(tmp_path / "out")


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ([0.0, 0.5, 1.0], None),
        ([0.0, 0.5], "2 weights for 3 tokens"),
        ([0.0, -0.5, 1.0], "negative, which ms-swift takes for an unscored token"),
        ([0.0, 0.5, 0.0], "the last token has no weight"),
        ([0.0, 0.1, 1.0], "no float32"),
    ],
)
def test_swift(scales, reason):
    content = {"token_ids": [4, 5, 6], "loss_scale": scales}
    fault = swift_fault({"sample_id": "s", "messages": [{"role": "assistant", "content": content}]})
    assert fault is None if reason is None else reason in fault


@pytest.mark.parametrize("form", ["hf", "shifted"])
def test_files_that_are_not_those_written(exported, tmp_path, form):
    exported(form, shard_tokens=100)
    out = tmp_path / "out"
    path = sorted(out.glob("train-00001.*"))[0]
    content = path.read_bytes()
    for at in np.linspace(0, len(content) - 1, 20).astype(int):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(MismatchError, match="train-00001.* is not the file that was written"):
            check(out)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(MismatchError, match="not the file that was written"):
        check(out)
    path.unlink()
    with pytest.raises(MismatchError, match="train-00001.* is missing"):
        check(out)
    path.write_bytes(content)
    (out / f"train-99999{path.suffix}").write_bytes(content)
    with pytest.raises(MismatchError, match="loaders would read it"):
        check(out)


def test_a_file_of_other_columns(exported, tmp_path):
    exported("hf")
    path = tmp_path / "out" / "train-00000.parquet"
    table = pq.read_table(path)
    weights = table["loss_weights"].cast(pa.list_(pa.int32()), safe=False)
    index = table.column_names.index("loss_weights")
    pq.write_table(table.set_column(index, "loss_weights", weights), path)
    with pytest.raises(MismatchError, match="columns"):
        check(tmp_path / "out")


def test_what_is_no_export(tmp_path):
    with pytest.raises(UsageError, match="there is no export at"):
        check(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no export of ours"):
        check(tmp_path)
    (tmp_path / "pear_export.json").write_text("{}")
    with pytest.raises(UsageError, match="not readable as an export's manifest"):
        check(tmp_path)
