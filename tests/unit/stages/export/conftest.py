"""Exports of a small store, and what each sample's row has to hold, worked out sample by sample."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from pear_data import open_store
from pear_data.config import ExportSettings, WeightSettings
from pear_data.progress import Silent
from pear_data.stages.export import export
from pear_data.stages.weight import weight_all
from pear_data.store import writable_store

DROPPED, UNSCORED = 5, 9


@pytest.fixture
def folder(make_store, samples):
    """A store of 20 samples, one negative (dropped) and one too long for a policy, weighted at three levels."""
    samples[DROPPED].label = -1
    samples[UNSCORED].initial_status = "too_long"
    folder = make_store(samples)
    with writable_store(folder) as store:
        weight_all(store, [WeightSettings(level=level) for level in ("token", "block", "uniform")], Silent())
    return folder


@pytest.fixture
def exported(folder, tmp_path):
    """`exported(format, weights="token", **settings)`: the summary, the manifest and the rows by split."""

    def run(form, weights="token", name="out", **settings):
        out = tmp_path / name
        chosen = ExportSettings(out=str(out), weights=weights, format=form, **settings)
        outcome = export(open_store(folder), chosen, Silent())
        rows = {}
        for path in sorted(out.glob("*-*")):
            rows.setdefault(path.name.split("-")[0], []).extend(_rows(path))
        return outcome.summary, json.loads((out / "pear_export.json").read_text()), rows

    return run


def _rows(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def expected(folder, samples):
    """`expected(weights)`: sample id -> (ids, scored, weights at labels, behavior log-probs at labels), all numpy."""

    def build(weights="token"):
        rows = open_store(folder).weights[weights].to_table().to_pylist()
        found = {}
        for sample, row in zip(samples, rows, strict=True):
            if row["status"] != "ok":
                continue
            at_labels = np.zeros((2, len(sample.input_ids)), dtype=np.float32)
            for place, (value, logprob) in zip(
                np.flatnonzero(sample.loss_mask),
                zip(row["weights"], sample.behavior, strict=True),
                strict=True,
            ):
                at_labels[:, place] = value, logprob
            found[sample.sample_id] = (sample.input_ids, sample.loss_mask, *at_labels)
        return found

    return build
