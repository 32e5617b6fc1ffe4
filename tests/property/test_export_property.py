"""Whatever a store holds, an export read again has exactly its numbers, each sample once, and passes its own check."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pear_data.stages.export.check import IGNORED_LABEL
from pear_data.stages.export.files import SplitFiles
from pear_data.stages.export.formats import Format
from pear_data.stages.export.reread import file_fault
from pear_data.stages.export.rows import Rows
from pear_data.stages.export.shifted import shifted_format
from pear_data.stages.export.tables import hf_format, packed_format, verl_format

MAX_LENGTH = 12
FORMS = {
    "hf": lambda: hf_format(live=True),
    "hf-packed": lambda: packed_format(MAX_LENGTH, live=True),
    "verl": verl_format,
    "shifted": lambda: shifted_format(MAX_LENGTH),
}
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


@dataclass(frozen=True)
class Sample:
    name: str
    ids: list[int]
    scored: list[bool]
    weights: list[float]
    behavior: list[float]


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    """Samples with any names, ids, masks (never the first token) and float32 weights."""
    found = []
    names = draw(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=12, unique=True))
    for name in names:
        length = draw(st.integers(1, MAX_LENGTH))
        scored = [False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))]

        def at_labels(scored: list[bool] = scored) -> list[float]:
            return [draw(float32s) if one else 0.0 for one in scored]

        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length))
        found.append(Sample(name, ids, scored, at_labels(), at_labels()))
    return found


def rows_of(given_samples: list[Sample]) -> Rows:
    def flat(name: str, kind: type) -> np.ndarray:
        return np.array([x for sample in given_samples for x in getattr(sample, name)], dtype=kind)

    names = pa.array([sample.name for sample in given_samples])
    return Rows(
        sample_id=names,
        source=names,
        record=None,
        lengths=np.array([len(sample.ids) for sample in given_samples]),
        input_ids=flat("ids", np.int32),
        scored=flat("scored", np.bool_),
        loss_weights=flat("weights", np.float32),
        behavior_logprobs=flat("behavior", np.float32),
    )


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(given_samples=samples(), shard_tokens=st.integers(1, 60), group_tokens=st.integers(1, 40))
def test_what_goes_out_comes_back(
    form: str, given_samples: list[Sample], shard_tokens: int, group_tokens: int
) -> None:
    fault = file_fault(form, MAX_LENGTH, live=form.startswith("hf"))
    made = FORMS[form]()
    made = Format(**{name: getattr(made, name) for name in made.__slots__} | {"group_tokens": group_tokens})
    with tempfile.TemporaryDirectory() as folder:
        with SplitFiles(Path(folder), made, fault, shard_tokens) as files:
            for start in range(0, len(given_samples), 5):
                files.write("train", rows_of(given_samples[start : start + 5]))
        read = [row for file in files.written for row in read_rows(Path(folder) / file.name)]
        assert sum(file.rows for file in files.written) == len(read)
        assert not any(map(fault, (Path(folder) / file.name for file in files.written)))
    if form == "hf-packed":
        assert all(len(pack["input_ids"]) <= MAX_LENGTH for pack in read)
        read = [sample for pack in read for sample in unpacked(pack)]
        read.sort(key=lambda row: [sample.name for sample in given_samples].index(row["sample_id"]))
    assert [row["sample_id"] for row in read] == [sample.name for sample in given_samples]
    for row, sample in zip(read, given_samples, strict=True):
        assert_same(form, row, sample)


def assert_same(form: str, row: dict, sample: Sample) -> None:
    ids, weights = sample.ids, sample.weights
    if form == "shifted":  # filled up
        filler = [0] * (MAX_LENGTH - len(ids))
        ids, weights = [*ids, *filler], [*weights[1:], 0.0, *filler]
    assert row["input_ids"] == ids
    assert np.array_equal(row["loss_weights"], weights)
    if form.startswith("hf"):
        labels = [i if one else IGNORED_LABEL for i, one in zip(sample.ids, sample.scored, strict=True)]
        assert row["labels"] == labels
        assert row["behavior_logprobs"] == sample.behavior


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def unpacked(pack: dict) -> list[dict]:
    columns = ("input_ids", "labels", "loss_weights", "behavior_logprobs")
    ends = np.cumsum(pack["seq_lengths"])
    return [
        {"sample_id": name, **{column: pack[column][end - length : end] for column in columns}}
        for name, end, length in zip(pack["sample_ids"], ends, pack["seq_lengths"], strict=True)
    ]
