"""What an engine or a corpus may give that no artefact may hold: numbers that are none, ids met twice, other ids."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_job import CORPUS, OUT, SAMPLES, STORE, corpus_settings, in_process, whole_states, write_corpus

from pear_data import open_store
from pear_data.config import ExportSettings, ScoreSettings, WeightSettings
from pear_data.demo import asset
from pear_data.errors import MismatchError, PearError
from pear_data.progress import Silent
from pear_data.runners.base import Scored
from pear_data.stages.export import export
from pear_data.stages.ingest import ingest
from pear_data.stages.same_ids import same_ids_check
from pear_data.stages.score import score
from pear_data.stages.sources import engine_source
from pear_data.stages.verify import verify
from pear_data.stages.weight import weight
from pear_data.store import writable_store


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return whole_states(tmp_path_factory.mktemp("states"))


@pytest.fixture
def job(done, tmp_path):
    return shutil.copytree(done, tmp_path / "job")


class Spoilt:
    """The bundled model, but for the first scored token of sample s1."""

    def __init__(self, value):
        self._model, self._value = in_process(), value
        self.batch_tokens, self.max_length = self._model.batch_tokens, self._model.max_length
        self.identity = self._model.identity

    def score(self, batch, on_tokens):
        scored = self._model.score(batch, on_tokens).logprobs
        for row, name in enumerate(batch.sample_ids):
            if name == "s1":
                scored[batch.scored_offsets[row]] = self._value
        return Scored(scored, {})


def floats(table):
    """Every floating-point number in a table, those in lists too, but no null."""
    for column in table.columns:
        column = column.combine_chunks()
        while pa.types.is_list(column.type):
            column = column.flatten()
        if pa.types.is_floating(column.type):
            yield column.drop_null().to_numpy()


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_a_number_that_is_none_becomes_null_and_no_artefact_holds_it(job, value):
    with writable_store(job / STORE) as store:
        outcome = score(
            store, ScoreSettings(policy="spoilt", model="m"), engine_source(Spoilt(value), None), Silent()
        )
        assert outcome.rejected == 1
        weight(store, WeightSettings(target="spoilt", name="spoilt"), Silent())
        export(store, ExportSettings(out=str(job / "spoilt"), weights="spoilt"), Silent())
        verify(store, Silent())
    rows = open_store(job / STORE).scores["spoilt"].to_table().to_pylist()
    bad = {row["sample_id"]: row for row in rows if row["status"] != "ok"}
    assert bad.keys() == {"s1"}
    assert bad["s1"]["status"] == "nonfinite"
    assert bad["s1"]["logprobs"] is bad["s1"]["logprob_sum"] is None
    # In totals the least of no weight at all is infinity.
    paths = [path for path in job.rglob("*.parquet") if not path.name.endswith(".totals.parquet")]
    numbers = [found for path in paths for found in floats(pq.read_table(path))]
    assert len(numbers) > SAMPLES
    assert all(np.isfinite(found).all() for found in numbers)


@pytest.mark.parametrize("longest", [342, 343, 344])
def test_a_sample_of_one_token_too_many_is_left_out_and_said_to_be(job, longest):
    policy = ScoreSettings(policy="short", model="m")
    with writable_store(job / STORE) as store:
        score(store, policy, engine_source(in_process(), longest), Silent())
    rows = open_store(job / STORE).scores["short"].to_table().to_pylist()
    assert {row["sample_id"]: row["status"] for row in rows} == {
        f"s{number}": "ok" if 340 + number <= longest else "too_long" for number in range(SAMPLES)
    }


@pytest.mark.parametrize("where", [1, -1])
@pytest.mark.parametrize("content", ["same", "different"])
def test_an_id_met_twice_is_refused_with_both_places(tmp_path, content, where):
    """In one shard, and in the first and the last."""
    folder = write_corpus(tmp_path / "job", SAMPLES)
    lines = (folder / CORPUS).read_text().splitlines()
    again = json.loads(lines[0]) | ({"source": "another"} if content == "different" else {})
    lines.insert(where if where > 0 else len(lines), json.dumps(again))
    (folder / CORPUS).write_text("\n".join(lines) + "\n")
    with (
        writable_store(folder / STORE, create=True) as store,
        pytest.raises(PearError, match=r"the sample id 's0' occurs twice, at .* and at .*:row"),
    ):
        ingest(store, corpus_settings(folder), Silent())
    assert not open_store(folder / STORE).stage("corpus").complete
    with writable_store(folder / "numbered", create=True) as store:
        numbered = corpus_settings(folder).model_copy(update={"id_field": ":row"})
        assert ingest(store, numbered, Silent()).rejected == 1


def test_a_model_of_another_tokenizer_is_refused(job, tmp_path):
    content = json.loads((asset("initial") / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[30:32]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    shutil.copytree(asset("initial"), tmp_path / "swapped")
    (tmp_path / "swapped" / "tokenizer.json").write_text(json.dumps(content))
    with writable_store(job / STORE) as store:
        check = same_ids_check(store, str(tmp_path / "swapped"), None, False)
        source = replace(engine_source(in_process(), None), check_batch=check)
        with pytest.raises(MismatchError, match="cannot score this corpus") as caught:
            score(store, ScoreSettings(policy="swapped", model="m"), source, Silent())
    assert caught.value.exit_code == 4
    assert not open_store(job / STORE).stage("scores/swapped").shards
    assert (job / OUT).exists()
