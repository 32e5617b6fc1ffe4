"""Whole jobs over child processes: real models side by side, one of them killed; an engine that fails on a sample."""

from __future__ import annotations

import os
import signal
from functools import partial

import psutil
import pyarrow.parquet as pq
import pytest
from faulty_engines import Faulty

from pear_data import open_store
from pear_data.config import IngestSettings, ScoreSettings
from pear_data.demo import asset
from pear_data.progress import Silent
from pear_data.runners.local_host import LocalHost
from pear_data.runners.supervised import SupervisedScorer
from pear_data.stages.ingest import ingest
from pear_data.stages.score import score, score_policy
from pear_data.stages.sources import engine_source
from pear_data.stages.verify import verify
from pear_data.store import writable_store


@pytest.fixture
def store(tmp_path):
    corpus = IngestSettings(
        corpus=[str(asset("corpus"))], tokenizer=str(asset("initial")), limit=100, shard_tokens=1000
    )
    with writable_store(tmp_path / "store", create=True) as opened:
        ingest(opened, corpus, Silent())
        yield opened


def engines():
    """Process ids of the child processes that run engines."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "pear_data.runners.child" in child.cmdline()]


class Killer(Silent):
    """Kills an engine when the first shard is done, and keeps what is said."""

    def __init__(self):
        self.before = []
        self.said = []

    def say(self, line):
        self.said.append(line)

    def shard(self, name, note, **how):
        if not self.before:
            self.before = engines()
            os.kill(self.before[0], signal.SIGKILL)


def test_two_workers_one_of_them_killed_store_what_one_does(store, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ScoreSettings(policy="one", model=str(asset("initial")), engine="transformers")
    score_policy(store, settings, Silent())
    killer = Killer()
    outcome = score_policy(store, settings.model_copy(update={"policy": "two", "workers": 2}), killer)
    assert len(killer.before) == 2
    assert killer.said[0] == "Scoring with transformers, as asked."
    assert all("killed by SIGKILL" in line for line in killer.said[1:])
    assert outcome.rejected == 0
    assert not engines()
    verify(store, Silent())
    opened = open_store(store.path)
    assert opened.scores["two"].to_table().equals(opened.scores["one"].to_table())
    stages = opened.manifest.stages
    assert stages["scores/two"].settings == stages["scores/one"].settings


def test_the_job_goes_on_without_the_samples_that_kill_the_engine(store, tmp_path):
    corpus = store.corpus.to_table()
    ids, records = corpus["sample_id"].to_pylist(), corpus["record"].to_pylist()
    engine = Faulty(tmp_path, {ids[3]: "exit", ids[40]: "no memory"})
    scorer = SupervisedScorer(partial(LocalHost, engine, {}), print)
    try:
        outcome = score(store, ScoreSettings(policy="p", model="m"), engine_source(scorer, None), Silent())
    finally:
        scorer.close()
    assert outcome.rejected == 2
    assert "(2 failed, 98 ok); 2 in quarantine (`pear-data quarantine list`)" in outcome.summary
    verify(store, Silent())
    opened = open_store(store.path)
    rows = opened.scores["p"].to_table().to_pylist()
    assert [row["sample_id"] for row in rows if row["status"] == "failed"] == [ids[3], ids[40]]
    assert {row["status"] for row in rows} == {"ok", "failed"}
    entries = [shard.quarantine for shard in opened.stage("scores/p").shards if shard.quarantine]
    kept = [row for entry in entries for row in pq.read_table(opened.file(entry)).to_pylist()]
    assert [row["raw"].decode() for row in kept] == [records[3], records[40]]
    assert [row["reason"] for row in kept] == [
        "its process exited with code 7; its last words: goodbye",
        "out of memory (MemoryError: no message)",
    ]
