"""`verify` finds every kind of damage and names the file."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_data import open_store
from pear_data.config import WeightSettings
from pear_data.errors import MismatchError
from pear_data.progress import Silent
from pear_data.stages.verify import verify
from pear_data.stages.weight import weight
from pear_data.store import writable_store


class Recorder(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def folder(make_store, samples):
    samples[2].initial_status = "too_long"
    folder = make_store(samples)
    with writable_store(folder) as store:
        weight(store, WeightSettings(), Silent())
    return folder


def faults(folder):
    recorder = Recorder()
    with pytest.raises(MismatchError, match="faults in 13 files"):
        verify(open_store(folder), recorder)
    return recorder.lines


def test_a_whole_store_passes(folder):
    assert "13 files in 4 stages are whole and aligned" in verify(open_store(folder), Silent()).summary


@pytest.mark.parametrize(
    "path",
    [
        "corpus/part-00001.parquet",
        "scores/initial/part-00000.parquet",
        "weights/block/part-00002.parquet",
        "tokenizer/vocabulary.parquet",
    ],
)
def test_flips_cuts_and_losses(folder, path):
    whole = (folder / path).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content, message in ((bytes(flipped), "sha256"), (whole[:-1], "bytes where the manifest says")):
        (folder / path).write_bytes(content)
        assert [line for line in faults(folder) if path in line and message in line]
    (folder / path).unlink()
    assert [line for line in faults(folder) if path in line and "is missing" in line]


def test_weights_of_other_log_probs_are_named(folder):
    with writable_store(folder) as store:
        store.stage("weights/block").shards[1].inputs["scores/initial"] = "0" * 64
        store.save()
    (line,) = faults(folder)
    assert "weights/block/part-00001.parquet was made from another shard of scores/initial" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.take([1, 0, *range(2, len(t))]), "rows are not those of corpus/part-00000.parquet"),
        (lambda t: t.slice(0, 3), "does not hold the 7 rows"),
        (lambda t: t.drop_columns("logprob_sum"), "another schema"),
        (
            lambda t: t.set_column(3, t.schema.field(3), pa.array(np.ones(len(t)), pa.int32())),
            "num_scored differs from the length of logprobs",
        ),
        (
            lambda t: t.set_column(2, t.schema.field(2), pa.array([[1]] * len(t), t.schema.field(2).type)),
            "span_tokens do not sum to num_scored",
        ),
        (
            lambda t: t.set_column(5, t.schema.field(5), pa.array(["ok"] * len(t))),
            "rows with status ok have no logprobs",
        ),
    ],
)
def test_wrong_content_under_a_right_checksum(folder, change, message):
    with writable_store(folder) as store:
        shard = store.stage("scores/initial").shards[0]
        path = store.path / shard.file.path
        pq.write_table(change(pa.concat_tables(store.row_groups(shard))), path, row_group_size=3)
        shard.file = store.entry_of(path)
        store.save()
    assert [line for line in faults(folder) if message in line]
