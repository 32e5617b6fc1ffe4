"""The bundled corpus, and its policies scored in this process: loading an engine in a child takes seconds each time."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from pear_data import open_store
from pear_data.cli.entry import run
from pear_data.demo import asset
from pear_data.engines.transformers_engine import TransformersEngine
from pear_data.schema import STATUS_OK, STATUS_TOO_LONG
from pear_data.stages.sources import GroupScores, PolicySource

BUNDLED_SAMPLES = 40


@pytest.fixture(scope="session")
def ingested(tmp_path_factory):
    """A store with 40 bundled samples in three shards, and nothing scored."""
    folder = tmp_path_factory.mktemp("ingested") / "store"
    corpus = [str(asset("corpus")), "--limit", str(BUNDLED_SAMPLES), "--shard-tokens", "2000"]
    assert run(["ingest", *corpus, "--tokenizer", str(asset("initial")), "--store", str(folder)]) == 0
    assert len(open_store(folder).stage("corpus").shards) == 3
    return folder


@pytest.fixture(scope="session")
def source_of():
    """`source_of(policy, dtype)`: a bundled policy's source, its transformers engine in this process."""

    def source(policy, dtype="float32", max_length=None):
        engine = _engine(policy, dtype)
        longest = max_length or engine.max_length

        def score_group(batch, records, on_tokens):
            status = np.where(batch.num_tokens <= longest, STATUS_OK, STATUS_TOO_LONG).astype(object)
            return GroupScores(engine.score(batch, on_tokens), status)

        return PolicySource({**engine.identity(), "max_length": longest}, score_group)

    yield source
    _engine.cache_clear()


@cache
def _engine(policy, dtype):
    return TransformersEngine(str(asset(policy)), dtype=dtype, device="cpu")
