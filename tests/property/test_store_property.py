"""Whatever samples hold, a store gives them back: as datasets, through the views, and exported."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pear_data.config import ExportSettings, ScoreSettings, WeightSettings
from pear_data.progress import Silent
from pear_data.runners.base import Scored
from pear_data.schema import VOCABULARY
from pear_data.stages.export import export
from pear_data.stages.ingest_batches import Batch, Sample
from pear_data.stages.ingest_shard import shard_writer
from pear_data.stages.score import score
from pear_data.stages.sources import engine_source
from pear_data.stages.verify import verify
from pear_data.stages.weight import weight
from pear_data.store import open_store, writable_store
from pear_data.store.manifest import Cursor, TokenizerEntry

VOCABULARY_SIZE = 50

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["../../x", "a\0b", "\x1b[2J", "<script>", "'; drop table samples; --", "\u202e", "\ufeff", "😀" * 40]
)


@st.composite
def samples(draw):
    ids = draw(st.lists(text.filter(bool), min_size=1, max_size=12, unique=True))
    made = []
    for sample_id in ids:
        length = draw(st.integers(2, 12))
        tokens = draw(st.lists(st.integers(0, VOCABULARY_SIZE - 1), min_size=length, max_size=length))
        mask = [False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))]
        mask[draw(st.integers(1, length - 1))] = True
        made.append(
            Sample(
                "here",
                sample_id,
                draw(text.filter(bool)),
                1,
                np.array(tokens, np.int32),
                np.array(mask),
                draw(text),
            )
        )
    return made


class Scorer:
    """The log-prob of a token is -(its id + 1) / `divisor`."""

    name, batch_tokens, max_length = "s", 20, 100

    def __init__(self, divisor):
        self.divisor = divisor

    def identity(self):
        return {"divisor": self.divisor}

    def score(self, batch, on_tokens):
        return Scored(self.logprobs(batch.input_ids[batch.loss_mask]), {})

    def logprobs(self, ids):
        return (-(ids + 1) / self.divisor).astype(np.float32)


INITIAL, BEHAVIOR = Scorer(32), Scorer(64)


def stored(folder, made, shards):
    with writable_store(folder, create=True) as store:
        vocabulary = store.path / "tokenizer" / "vocabulary.parquet"
        vocabulary.parent.mkdir()
        tokens = [f"t{index}" for index in range(VOCABULARY_SIZE)]
        pq.write_table(pa.table([range(VOCABULARY_SIZE), tokens], schema=VOCABULARY), vocabulary)
        store.manifest.tokenizer = TokenizerEntry(
            name="t",
            fingerprint="f",
            template_fingerprint="g",
            files=[],
            vocabulary=store.entry_of(vocabulary),
        )
        corpus = store.begin("corpus", {"made": "here", "tokenizer": "f", "chat_template": "g"})
        for number, part in enumerate(np.array_split(np.arange(len(made)), min(shards, len(made)))):
            with shard_writer(store, f"part-{number:05d}") as writer:
                writer.add(Batch(Cursor(input=0, row=number), [made[index] for index in part]))
            store.commit("corpus", writer.entry())
        corpus.complete = True
        store.save()
        for policy, scorer in {"initial": INITIAL, "behavior": BEHAVIOR}.items():
            score(store, ScoreSettings(policy=policy, model="m"), engine_source(scorer, None), Silent())
        weight(store, WeightSettings(level="uniform", name="one", workers=1), Silent())
    return open_store(folder)


@settings(
    max_examples=settings.default.max_examples // 8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(made=samples(), shards=st.integers(1, 3))
def test_samples_come_back_as_they_went_in(made, shards):
    with tempfile.TemporaryDirectory() as folder:
        store = stored(Path(folder) / "store", made, shards)
        verify(store, Silent())
        for row, sample in zip(store.corpus.to_table().to_pylist(), made, strict=True):
            assert (row["sample_id"], row["source"], row["record"]) == (
                sample.sample_id,
                sample.source,
                sample.record,
            )
            assert row["input_ids"] == sample.input_ids.tolist()
            assert row["loss_mask"] == sample.loss_mask.tolist()
        _views_agree(store, made)
        export(store, ExportSettings(out=str(Path(folder) / "out"), weights="one"), Silent())
        exported = pa.concat_tables(map(pq.read_table, sorted((Path(folder) / "out").glob("*.parquet"))))
        assert {row["sample_id"]: row["labels"] for row in exported.to_pylist()} == {
            sample.sample_id: np.where(sample.loss_mask, sample.input_ids, -100).tolist() for sample in made
        }


def _views_agree(store, made):
    rows = store.sql("from tokens").to_pylist()
    found = {}
    for row in sorted(rows, key=lambda row: row["position"]):
        found.setdefault(row["sample_id"], []).append(
            (row["position"], row["token_id"], row["token"], row["logprob_initial"], row["logprob_behavior"])
        )
    assert found.keys() == {sample.sample_id for sample in made}
    for sample in made:
        ids = sample.input_ids[sample.loss_mask]
        assert found[sample.sample_id] == list(
            zip(
                np.flatnonzero(sample.loss_mask).tolist(),
                ids.tolist(),
                [f"t{token}" for token in ids],
                INITIAL.logprobs(ids).tolist(),
                BEHAVIOR.logprobs(ids).tolist(),
                strict=True,
            )
        )
    counts = {
        row["sample_id"]: (row["source"], row["num_scored"]) for row in store.sql("from samples").to_pylist()
    }
    assert counts == {sample.sample_id: (sample.source, int(sample.loss_mask.sum())) for sample in made}
