"""A store as the stages before weighting leave it, from arrays the test can see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_data.schema import CORPUS, FLOATS, INPUT_IDS, INT32S, LOSS_MASK, SCORES, VOCABULARY
from pear_data.store import writable_store
from pear_data.store.columns import list_column
from pear_data.store.manifest import Shard, TokenizerEntry
from pear_data.store.shards import parquet_shard

VOCABULARY_SIZE = 50


@dataclass
class Sample:
    sample_id: str
    label: int
    input_ids: np.ndarray
    loss_mask: np.ndarray
    initial: np.ndarray
    behavior: np.ndarray
    initial_status: str = "ok"
    behavior_status: str = "ok"
    initial_spans: np.ndarray | None = None
    behavior_spans: np.ndarray | None = None


def make_samples(count, seed=0):
    random = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        length = int(random.integers(2, 40))
        mask = random.random(length) < 0.6
        mask[0], mask[-1] = False, True
        scored = int(mask.sum())
        behavior = -random.exponential(0.5, scored).astype(np.float32)
        initial = np.minimum(behavior + random.normal(-0.05, 0.3, scored), 0).astype(np.float32)
        ids = random.integers(0, VOCABULARY_SIZE, length).astype(np.int32)
        samples.append(Sample(f"s{index}", 1, ids, mask, initial, behavior))
    return samples


def _corpus_table(samples):
    lengths = np.array([len(sample.input_ids) for sample in samples])
    return pa.table(
        [
            pa.array([sample.sample_id for sample in samples]),
            pa.array(["even" if index % 2 == 0 else "odd" for index in range(len(samples))]),
            pa.array([sample.label for sample in samples], pa.int8()),
            list_column(np.concatenate([sample.input_ids for sample in samples]), lengths, INPUT_IDS),
            list_column(np.concatenate([sample.loss_mask for sample in samples]), lengths, LOSS_MASK),
            pa.array(lengths, pa.int32()),
            pa.array([sample.loss_mask.sum() for sample in samples], pa.int32()),
            pa.array(["{}"] * len(samples)),
        ],
        schema=CORPUS,
    )


def _scores_table(samples, policy):
    status = [getattr(sample, f"{policy}_status") for sample in samples]
    ok = np.array([s == "ok" for s in status])
    values = [getattr(sample, policy) if good else [] for sample, good in zip(samples, ok, strict=True)]
    return pa.table(
        [
            pa.array([sample.sample_id for sample in samples]),
            list_column(
                np.concatenate(values).astype(np.float32), np.array([len(v) for v in values]), FLOATS, ok
            ),
            _span_column(samples, policy, ok),
            pa.array([sample.loss_mask.sum() for sample in samples], pa.int32()),
            pa.array([float(np.sum(v, dtype=np.float64)) for v in values], mask=~ok),
            pa.array(status),
        ],
        schema=SCORES,
    )


def _span_column(samples, policy, ok):
    spans = [getattr(sample, f"{policy}_spans") for sample in samples]
    return pa.array(
        [None if mine is None or not good else mine.tolist() for mine, good in zip(spans, ok, strict=True)],
        INT32S,
    )


def _align(samples, policy):
    """What a policy's settings say about its alignment."""
    return {"align": "bytes"} if getattr(samples[0], f"{policy}_spans") is not None else {}


def _write(store, key, name, schema, tables, inputs):
    final = store.path / key / f"{name}.parquet"
    with parquet_shard(final, schema) as writer:
        for table in tables:
            writer.write(table)
    rows = pa.concat_tables(tables)
    scored = int(rows["num_scored"].to_numpy().sum())
    tokens = int(rows["num_tokens"].to_numpy().sum()) if "num_tokens" in rows.column_names else scored
    entry = Shard(
        name=name,
        file=store.entry_of(final),
        rows=len(rows),
        num_tokens=tokens,
        num_scored=scored,
        inputs=inputs,
    )
    store.commit(key, entry)
    return {key: entry.file.sha256}


@pytest.fixture
def make_store(tmp_path):
    """`make_store(samples)`: a store of them, scored by both policies, in shards of 7 and row groups of 3."""

    def make(samples, folder="store"):
        with writable_store(tmp_path / folder, create=True) as store:
            vocabulary = store.path / "tokenizer" / "vocabulary.parquet"
            vocabulary.parent.mkdir()
            tokens = [f" t{index}" for index in range(VOCABULARY_SIZE)]
            pq.write_table(pa.table([range(VOCABULARY_SIZE), tokens], schema=VOCABULARY), vocabulary)
            store.manifest.tokenizer = TokenizerEntry(
                name="t",
                fingerprint="f",
                template_fingerprint="g",
                files=[],
                vocabulary=store.entry_of(vocabulary),
            )
            corpus = store.begin("corpus", {"made": "here"})
            for policy in ("initial", "behavior"):
                made = {"model": policy, **_align(samples, policy)}
                store.begin(f"scores/{policy}", {**made, "inputs": {"corpus": corpus.fingerprint}})
            for number, start in enumerate(range(0, len(samples), 7)):
                shard = samples[start : start + 7]
                groups = [shard[at : at + 3] for at in range(0, len(shard), 3)]
                name = f"part-{number:05d}"
                inputs = _write(store, "corpus", name, CORPUS, [_corpus_table(group) for group in groups], {})
                for policy in ("initial", "behavior"):
                    tables = [_scores_table(group, policy) for group in groups]
                    _write(store, f"scores/{policy}", name, SCORES, tables, inputs)
            for stage in store.manifest.stages.values():
                stage.complete = True
            store.save()
        return tmp_path / folder

    return make


@pytest.fixture
def samples():
    return make_samples(20)
