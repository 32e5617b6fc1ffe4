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
from pear_data.schema import CORPUS_SUMMARY
from pear_data.stages import verify_sums
from pear_data.stages.verify import verify
from pear_data.stages.weight import weight
from pear_data.store import writable_store
from pear_data.store.shards import summary_path, summary_shard


class Recorder(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def folder(make_store, samples, monkeypatch):
    monkeypatch.setattr(verify_sums, "BATCH_ROWS", 2)  # row groups are of 3
    samples[2].initial_status = "too_long"
    samples[4].label = -1
    folder = make_store(samples)
    with writable_store(folder) as store:
        summarise_corpus(store)
        weight(store, WeightSettings(), Silent())
    return folder


def summarise_corpus(store):
    for shard in store.stage("corpus").shards:
        path = summary_path(store.path, "corpus", shard.name)
        with summary_shard(path, CORPUS_SUMMARY) as writer:
            for table in store.row_groups(shard, CORPUS_SUMMARY.names):
                writer.add(table)
        shard.summary = store.entry_of(path)
    store.save()


def faults(folder):
    recorder = Recorder()
    with pytest.raises(MismatchError, match="faults in 22 files"):
        verify(open_store(folder), recorder)
    return recorder.lines


def test_a_whole_store_passes(folder):
    assert "22 files in 4 stages are whole and aligned" in verify(open_store(folder), Silent()).summary


@pytest.mark.parametrize("level", ["token", "sequence", "uniform", "dft"])
@pytest.mark.parametrize("more", [{}, {"center": "sample", "normalize": "corpus"}, {"negative_scale": 2.0}])
def test_every_weighting_passes(folder, level, more):
    if level in ("uniform", "dft") and "center" in more:
        more = {}
    with writable_store(folder) as store:
        weight(store, WeightSettings(level=level, **more), Silent())
    verify(open_store(folder), Silent())


def test_a_corpus_without_summaries_passes(make_store, samples):
    folder = make_store(samples)
    with writable_store(folder) as store:
        weight(store, WeightSettings(), Silent())
    assert "19 files" in verify(open_store(folder), Silent()).summary


@pytest.mark.parametrize(
    "path",
    [
        "corpus/part-00001.parquet",
        "scores/initial/part-00000.parquet",
        "weights/block/part-00002.parquet",
        "summary/corpus/part-00001.parquet",
        "summary/weights/block/part-00000.parquet",
        "summary/weights/block/part-00000.totals.parquet",
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


def test_a_part_of_another_shape_is_named_once(folder):
    shard = rewritten(folder, "weights/block", "file", lambda t: t.drop_columns("weights"))
    assert faults(folder) == [f"{folder / shard.file.path} has another schema than weights files have"]


def added(name, amount, row=0):
    """A change of one value of a column, or of the first of a list's."""

    def change(table):
        values = table[name].to_pylist()
        row_at = next(at for at in range(row, len(values)) if values[at] is not None)
        value = values[row_at]
        values[row_at] = [value[0] + amount, *value[1:]] if isinstance(value, list) else value + amount
        field = table.schema.field(name)
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))

    return change


def renamed(old, new, column="source"):
    def change(table):
        field = table.schema.field(column)
        values = [new if value == old else value for value in table[column].to_pylist()]
        return table.set_column(table.schema.get_field_index(column), field, pa.array(values, field.type))

    return change


def rewritten(folder, key, file, change):
    """The manifest's entry of the first shard, one of whose files was changed and given the right checksum."""
    with writable_store(folder) as store:
        shard = store.stage(key).shards[0]
        path = store.path / getattr(shard, file).path
        pq.write_table(change(pq.read_table(path)), path)
        setattr(shard, file, store.entry_of(path))
        store.save()
    return shard


@pytest.mark.parametrize(
    ("key", "file", "change", "message"),
    [
        ("corpus", "summary", renamed("odd", "even"), "rows are not those of corpus/part-00000.parquet"),
        ("corpus", "summary", lambda t: t.slice(0, 5), "rows are not those of corpus/part-00000.parquet"),
        ("corpus", "summary", lambda t: pa.concat_tables([t, t]), "rows are not those of corpus/part-00000"),
        (
            "corpus",
            "summary",
            lambda t: t.drop_columns("label"),
            "another schema than summaries of the corpus",
        ),
        (
            "weights/block",
            "summary",
            added("num_scored", 1),
            "rows are not those of weights/block/part-00000",
        ),
        (
            "weights/block",
            "summary",
            lambda t: t.slice(0, 6),
            "rows are not those of weights/block/part-00000",
        ),
        (
            "weights/block",
            "summary",
            lambda t: t.take([1, 0, *range(2, len(t))]),
            "rows are not those of weights",
        ),
        (
            "weights/block",
            "summary",
            renamed("ok", "dropped", "status"),
            "rows are not those of weights/block",
        ),
        (
            "weights/block",
            "summary",
            lambda t: t.drop_columns("weight_sum"),
            "another schema than summaries of",
        ),
        (
            "weights/block",
            "summary",
            added("weight_sum", 1e-4),
            "weight_sum is not that of the weights in weights/",
        ),
        ("weights/block", "summary", added("weight_square_sum", 1e-4, 5), "weight_square_sum is not that of"),
        ("weights/block", "summary", added("weight_min", 1e-4), "weight_min is not that of the weights"),
        ("weights/block", "summary", added("weight_max", 1e-4), "weight_max is not that of the weights"),
        ("weights/block", "summary", added("saturated_high", 1), "saturated_high does not add up to what"),
        (
            "weights/block",
            "totals",
            added("tokens", 1),
            "tokens does not add up to what summary/weights/block",
        ),
        ("weights/block", "totals", added("weight_sum", 1e-4, 1), "weight_sum does not add up"),
        ("weights/block", "totals", added("clipped_low", 1), "clipped_low does not add up"),
        ("weights/block", "totals", added("negatives", 1), "negatives does not add up"),
        ("weights/block", "totals", added("dropped", 1), "dropped does not add up"),
        ("weights/block", "totals", added("weight_counts", 1), "weight_counts does not add up"),
        ("weights/block", "totals", added("sample_weight_counts", 1), "sample_weight_counts does not add up"),
        ("weights/block", "totals", added("log_ratio_counts", 1), "log_ratio_counts does not add up"),
        (
            "weights/block",
            "totals",
            renamed("odd", "other"),
            "sources are not those of summary/corpus/part-00000",
        ),
        (
            "weights/block",
            "totals",
            lambda t: t.slice(0, 1),
            "sources are not those of summary/corpus/part-00000",
        ),
        (
            "weights/block",
            "totals",
            lambda t: pa.concat_tables([t, t]),
            "sources are not those of summary/corpus",
        ),
        ("weights/block", "totals", lambda t: t.drop_columns("ok"), "another schema than totals have"),
    ],
)
def test_sums_that_do_not_fit_under_a_right_checksum(folder, key, file, change, message):
    shard = rewritten(folder, key, file, change)
    lines = faults(folder)
    assert [line for line in lines if message in line and "part-00000" in line]
    assert {line.partition(":")[0] for line in lines} <= {
        str(folder / entry.path) for entry in open_store(folder).stage("weights/block").shards[0].files
    } | {str(folder / shard.summary.path)}


@pytest.mark.parametrize("file", ["summary", "totals"])
def test_files_of_another_shard_are_told_apart(folder, file):
    with writable_store(folder) as store:
        first, second, _ = store.stage("weights/block").shards
        ours, theirs = getattr(first, file), getattr(second, file)
        (store.path / ours.path).write_bytes((store.path / theirs.path).read_bytes())
        setattr(first, file, store.entry_of(store.path / ours.path))
        store.save()
    assert [line for line in faults(folder) if line.startswith(str(folder / ours.path))]
