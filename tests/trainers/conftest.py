from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from own_environment import Environments, OwnEnvironment, install

from pear_data.cli.entry import run
from pear_data.demo import asset


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environments]:
    """Environments by name, each installed when it is first asked for, all removed at the end."""
    made: dict[str, OwnEnvironment] = {}
    folder = tmp_path_factory.mktemp("environments")

    def environment(name: str, requirements: Sequence[str]) -> OwnEnvironment:
        if name not in made:
            made[name] = install(folder / name, requirements)
        return made[name]

    yield environment
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def weighted_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 16 ragged conversations, half of them of two turns, weighted by block and by sequence."""
    folder = tmp_path_factory.mktemp("weighted")
    store = ["--store", str(folder / "store")]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _conversations()))
    scored = ["score", str(folder / "corpus.jsonl"), "--engine", "transformers", *store]
    assert run([*scored, "--model", str(asset("initial"))]) == 0
    behavior = ["--policy", "behavior", "--model", str(asset("behavior")), "--engine", "transformers"]
    assert run(["score", *behavior, *store]) == 0
    assert run(["weight", "--level", "block", *store]) == 0
    assert run(["weight", "--level", "sequence", *store]) == 0
    return folder / "store"


def _conversations() -> list[dict[str, Any]]:
    with gzip.open(asset("corpus"), "rt", encoding="utf-8") as lines:
        single = [json.loads(next(lines)) for _ in range(24)]
    paired = [
        {**first, "messages": first["messages"] + second["messages"]}
        for first, second in zip(single[8:16], single[16:], strict=True)
    ]
    return single[:8] + paired
