"""Token ids on which one policy and the other disagree throughout, planted in corpora that are otherwise ordinary."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_data.config import WeightSettings
from pear_data.errors import MismatchError
from pear_data.progress import Silent
from pear_data.schema import VOCABULARY
from pear_data.stages import token_drift
from pear_data.stages.statistics import statistics
from pear_data.stages.token_drift import drift_findings
from pear_data.stages.weight import weight
from pear_data.store import open_store, writable_store

END = 49


def turns(samples, count=60, length=40, seed=0):
    """Samples that end with the token END; both policies are surer of some tokens than of others."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(count):
        ids = random.integers(0, END, length).astype(np.int32)
        ids[-1] = END
        behavior = -np.where(random.random(length - 1) < 0.7, 0.05, random.exponential(2, length - 1))
        initial = np.minimum(behavior + random.normal(-0.3, 1, length - 1), 0)
        behavior[-1] = initial[-1] = -0.001
        made.append(
            dataclasses.replace(
                samples[0],
                sample_id=f"t{index}",
                input_ids=ids,
                loss_mask=np.arange(length) > 0,
                initial=initial.astype(np.float32),
                behavior=behavior.astype(np.float32),
            )
        )
    return made


def found_in(folder, **settings):
    return drift_findings(open_store(folder), WeightSettings(**settings))


def test_an_ordinary_corpus_has_none(make_store, samples):
    assert found_in(make_store(turns(samples))) == []


@pytest.mark.parametrize("one", ["initial", "behavior"])
def test_a_token_that_one_policy_never_writes_is_found(make_store, samples, one):
    made = turns(samples)
    for sample in made:
        getattr(sample, one)[-1] = -14
    (finding,) = found_in(make_store(made))
    mean = "-14" if one == "initial" else "14"
    # Eight of nine shards: three samples of each, but one of the last.
    assert (finding.code, finding.value, finding.threshold) == ("token_drift", 1.0, token_drift.ODD_SHARE)
    assert f'at 1 token ids: {END} " t{END}" (22 times, mean log-ratio {mean})' in finding.text
    assert "(looked for on 858 scored tokens)" in finding.text
    assert "--align bytes" in finding.text
    assert all(remedy.options == [] for remedy in finding.remedies)


def test_stats_tell_it_beside_what_else_is_wrong(make_store, samples):
    made = turns(samples)
    for sample in made:
        sample.initial[-1] = -14
    folder = make_store(made)
    with writable_store(folder) as store:
        weight(store, WeightSettings(), Silent())
    (found,) = statistics(open_store(folder))
    assert "token_drift" in [finding.code for finding in found.findings]


def test_the_query_it_names_lists_the_ids(make_store, samples):
    made = turns(samples)
    for sample in made:
        sample.initial[-1] = -14
    folder = make_store(made)
    with writable_store(folder) as store:
        weight(store, WeightSettings(), Silent())
    query = token_drift.LIST_IDS.removeprefix("pear-data sql '").removesuffix("'")
    first = open_store(folder).sql(query).to_pylist()[0]
    assert (first["token_id"], first["n"]) == (END, 60)
    assert first["mean_log_ratio"] == pytest.approx(-14, abs=0.01)


def test_a_rare_or_a_mixed_token_is_no_drift(make_store, samples):
    rare, mixed = turns(samples), turns(samples)
    for index, (few, half) in enumerate(zip(rare, mixed, strict=True)):
        if index < token_drift.OCCURRENCES - 1:
            few.initial[-1] = -14
        else:
            few.input_ids[-1] = 0
        half.initial[-1] = -14 if index % 3 else -0.001
    assert found_in(make_store(rare, "rare")) == []
    assert found_in(make_store(mixed, "mixed")) == []


def test_policies_far_apart_everywhere_are_no_matter_of_ids(make_store, samples):
    made = turns(samples)
    for sample in made:
        sample.initial[:], sample.behavior[:] = -8, -0.1
        sample.initial[::7] = -1
    assert found_in(make_store(made)) == []


def test_baselines_spans_and_samples_without_scores_are_left_out(make_store, samples):
    made = turns(samples)
    for sample in made:
        sample.initial[-1] = -14
    assert found_in(make_store(made), level="dft") == []
    for sample in made:
        sample.behavior_spans = np.ones(len(sample.behavior), dtype=np.int64)
    assert found_in(make_store(made, "spanned")) == []
    for sample in made:
        sample.behavior_spans = None
    for sample in made[: 60 - token_drift.OCCURRENCES + 1]:
        sample.behavior_status = "too_long"
    assert found_in(make_store(made, "unscored")) == []


def test_no_more_than_its_share_of_a_corpus_is_looked_at(make_store, samples, monkeypatch):
    made = turns(samples, count=140)
    for sample in made:
        sample.initial[-1] = -14
    folder = make_store(made)
    monkeypatch.setattr(token_drift, "LOOKED_AT_SHARDS", 10)
    (finding,) = found_in(folder)
    # Twenty shards, ten of them looked at; three samples in a middle row group.
    assert "30 times" in finding.text
    monkeypatch.setattr(token_drift, "LOOKED_AT_TOKENS", 10 * 39)
    (finding,) = found_in(folder)
    assert "20 times" in finding.text
    assert found_in(folder) == [finding]


def test_what_a_token_says_cannot_steer_the_terminal(make_store, samples):
    made = turns(samples)
    for sample in made:
        sample.initial[-1] = -14
    folder = make_store(made)
    with writable_store(folder) as store:
        vocabulary = folder / "tokenizer" / "vocabulary.parquet"
        pq.write_table(pa.table([[END], ["\x1b[2J\n" + "x" * 99]], schema=VOCABULARY), vocabulary)
        store.manifest.tokenizer.vocabulary = store.entry_of(vocabulary)
        store.save()
    (finding,) = found_in(folder)
    assert f'{END} "[2J⏎{"x" * 36}" (' in finding.text
    with writable_store(folder) as store:
        store.manifest.tokenizer = None
        store.save()
    (finding,) = found_in(folder)
    assert f"at 1 token ids: {END} (22 times" in finding.text


def test_files_that_do_not_belong_together_are_refused(make_store, samples):
    folder = make_store(turns(samples))
    store = open_store(folder)
    shards = store.stage("scores/behavior").shards
    shards[0].file, shards[1].file = shards[1].file, shards[0].file
    with pytest.raises(
        MismatchError, match="part-00000: the rows of the policies are not those of the corpus"
    ):
        drift_findings(store, WeightSettings())
    path = folder / shards[2].file.path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MismatchError, match="run `pear-data verify`"):
        found_in(folder)
