"""A real Ray cluster of two nodes on this machine that loses a worker and then a node while it scores."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from pear_data import open_store
from pear_data.config import IngestSettings, ScoreSettings, WeightSettings
from pear_data.demo import asset
from pear_data.errors import PearError
from pear_data.progress import Silent
from pear_data.runners import ray_host
from pear_data.runners.shard_workers import run_shards
from pear_data.stages.ingest import ingest
from pear_data.stages.score import score_policy
from pear_data.stages.verify import verify
from pear_data.stages.weight import weight
from pear_data.store import writable_store

NODE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    # The paths of Ray's sockets must be short, so not in tmp_path.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_TMPDIR", folder)
        made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 2})
        try:
            made.add_node(**NODE, num_cpus=2)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
            assert not engines_of(os.getpid())


@pytest.fixture
def store(tmp_path):
    corpus = IngestSettings(
        corpus=[str(asset("corpus"))], tokenizer=str(asset("initial")), limit=200, shard_tokens=2000
    )
    with writable_store(tmp_path / "store", create=True) as opened:
        ingest(opened, corpus, Silent())
        yield opened


def settings(policy, **where):
    return ScoreSettings(policy=policy, model=str(asset("initial")), engine="transformers", **where)


def engines_of(pid):
    """The workers below a process that are scoring right now."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "ServedEngine.score" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


class Saboteur(Silent):
    """As soon as shards are there, kills a worker at work; then, as soon as it has one at work, the second node."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.killed = []
        self.said = []
        self.thread = threading.Thread(target=self.strike)

    def shard(self, name, note, **how):
        if not self.killed and not self.thread.is_alive():
            self.thread.start()

    def say(self, line):
        self.said.append(line)

    def strike(self):
        (head, other) = self.cluster.list_all_nodes()
        self.killed.append(self.wait_for_worker(head).pid)
        os.kill(self.killed[0], signal.SIGKILL)
        self.killed.append(self.wait_for_worker(other).pid)
        self.cluster.remove_node(other, allow_graceful=False)

    def wait_for_worker(self, node):
        (raylet,) = node.all_processes["raylet"]
        deadline = time.monotonic() + 60
        while not (found := engines_of(raylet.process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return found[0]


def test_no_room_and_no_cluster_are_one_line(cluster, store, monkeypatch):
    monkeypatch.setattr(ray_host, "PLACEMENT_SECONDS", 1.0)
    crowd = settings("ray", runner="ray", ray_address=cluster.address, workers=5)
    with pytest.raises(PearError, match="Ray found no room for a worker within 1 s: lower --workers"):
        score_policy(store, crowd, Silent())
    assert not ray.is_initialized()
    with pytest.raises(PearError, match="no Ray cluster at 127.0.0.1:1 "):
        score_policy(store, crowd.model_copy(update={"ray_address": "127.0.0.1:1"}), Silent())


def test_a_lost_worker_and_a_lost_node_cost_no_sample_and_change_no_number(cluster, store, capfd):
    score_policy(store, settings("local"), Silent())
    saboteur = Saboteur(cluster)
    handler = signal.getsignal(signal.SIGTERM)
    capfd.readouterr()
    on_ray = settings("ray", runner="ray", ray_address=cluster.address, workers=2)
    outcome = score_policy(store, on_ray, saboteur)
    saboteur.thread.join(60)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "raylet" not in printed.err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(set(saboteur.killed)) == 2
    assert not any(psutil.pid_exists(pid) for pid in saboteur.killed)
    assert len(cluster.list_all_nodes()) == 1
    assert outcome.rejected == 0
    verify(store, Silent())
    opened = open_store(store.path)
    local, distributed = (opened.scores[policy].to_table() for policy in ("local", "ray"))
    assert distributed["sample_id"].to_pylist() == opened.corpus.to_table()["sample_id"].to_pylist()
    assert distributed.equals(local)
    stages = opened.manifest.stages
    assert stages["scores/ray"].settings == stages["scores/local"].settings


def test_shards_are_weighted_on_all_nodes(cluster, store, tmp_path):
    score_policy(store, settings("initial"), Silent())
    teacher = ScoreSettings(policy="behavior", model=str(asset("behavior")), engine="transformers")
    score_policy(store, teacher, Silent())
    options = {"level": "block", "center": "corpus", "normalize": "corpus"}
    weight(store, WeightSettings(name="here", **options), Silent())
    weight(
        store, WeightSettings(name="there", runner="ray", ray_address=cluster.address, **options), Silent()
    )
    here, there = (
        [
            (store.path / file.path).read_bytes()
            for shard in store.stage(f"weights/{name}").shards
            for file in shard.files
        ]
        for name in ("here", "there")
    )
    assert len(here) > 9
    assert here == there
    unseen = tmp_path / "elsewhere"
    with pytest.raises(PearError, match=f"node .* does not see {unseen}"):
        list(
            run_shards(
                len, ["a", "b"], tokens=2, workers=2, runner="ray", ray_address=cluster.address, root=unseen
            )
        )
