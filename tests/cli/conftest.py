"""One run of the whole job on the bundled corpus and models, shared by the tests that look at its results."""

from __future__ import annotations

import pytest

from pear_data.cli.entry import run
from pear_data.demo import asset

SAMPLES = 60


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """A folder with `store` (both policies, all three levels) and `export` (the block level), made by commands."""
    folder = tmp_path_factory.mktemp("job")
    store = ["--store", str(folder / "store")]
    corpus = [
        str(asset("corpus")),
        "--limit",
        str(SAMPLES),
        "--label-field",
        "label",
        "--shard-tokens",
        "3000",
    ]
    engine = ["--engine", "transformers"]
    assert run(["score", *corpus, "--model", str(asset("initial")), *engine, *store]) == 0
    assert run(["score", "--policy", "behavior", "--model", str(asset("behavior")), *engine, *store]) == 0
    for level in ("token", "block", "sequence"):
        assert run(["weight", "--level", level, *store]) == 0
    assert run(["export", str(folder / "export"), *store]) == 0
    return folder
