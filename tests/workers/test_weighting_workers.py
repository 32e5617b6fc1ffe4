"""Real processes weighting shards side by side: one killed, all interrupted, or left by their parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from pear_data import open_store
from pear_data.config import WeightSettings
from pear_data.progress import Silent
from pear_data.stages.verify import verify
from pear_data.stages.weight import weight
from pear_data.store import writable_store

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from synthetic_store import make_store

TREES = ("weights", "summary/weights")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A store of 60 shards that two processes need some seconds for."""
    folder = tmp_path_factory.mktemp("scored") / "store"
    make_store(folder, 12_000_000, shard_tokens=250_000, mean_tokens=300)
    with writable_store(folder) as store:
        weight(store, WeightSettings(level="token", name="whole"), Silent())
    return folder


@pytest.fixture
def start(scored):
    """Begin to weight with two workers, and wait until both are at work."""
    begun = []

    def begin(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pear_data", "weight", "--store", str(scored), "--level", "token"]
        process = subprocess.Popen(
            [*command, "--workers", "2", "--name", name], stderr=subprocess.PIPE, text=True
        )
        begun.append(process)
        deadline = time.monotonic() + 120
        while len(shards(scored, name)) < 3:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.stderr.close()
        process.wait()


def shards(folder: Path, name: str) -> list[dict]:
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    return stages.get(f"weights/{name}", {"shards": []})["shards"]


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


def assert_resumed(folder: Path, name: str) -> None:
    """The same command again makes what a run that nothing befell has made."""
    left = len(shards(folder, "whole")) - len(shards(folder, name))
    assert left > 0, "the fault came too late to test anything"
    with writable_store(folder) as store:
        weight(store, WeightSettings(level="token", name=name), Silent())
        verify(store, Silent())
    for tree in TREES:
        whole, resumed = folder / tree / "whole", folder / tree / name
        names = sorted(path.name for path in whole.iterdir())
        assert names == sorted(path.name for path in resumed.iterdir())
        assert all((whole / file).read_bytes() == (resumed / file).read_bytes() for file in names)
    rows = sum(pq.read_metadata(path).num_rows for path in (folder / "weights" / name).iterdir())
    assert rows == open_store(folder).stage("corpus").rows


def test_a_killed_worker_ends_the_command_and_costs_the_shards_at_work(start, scored):
    process = start("killed")
    workers = workers_of(process)
    workers[0].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Error: a worker was killed" in errors
    assert "Traceback" not in errors
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert_resumed(scored, "killed")


def test_an_interrupt_ends_all_workers_and_says_how_to_resume(start, scored):
    process = start("interrupted")
    workers = workers_of(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Resume with: pear-data weight" in errors
    assert "Traceback" not in errors
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert_resumed(scored, "interrupted")


def test_sigterm_to_every_process_of_a_job_is_an_interrupt(start, scored):
    """As a batch system ends one, or systemd: workers first, and twice."""
    process = start("cancelled")
    workers = workers_of(process)
    for _ in range(2):
        for each in (*workers, psutil.Process(process.pid)):
            each.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    said = [line for line in errors.splitlines() if line and not line.startswith("weights/cancelled part-")]
    assert len(said) == 1, said
    assert "Error: interrupted; finished shards are kept. Resume with: pear-data weight" in errors
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert not list(scored.rglob("*.tmp"))
    assert_resumed(scored, "cancelled")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_export_leaves_nothing(scored, tmp_path, signal_number):
    command = [
        sys.executable,
        "-m",
        "pear_data",
        "export",
        "out",
        "--weights",
        "whole",
        "--store",
        str(scored),
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.pear_export/train-*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Give it again with: pear-data export out --weights whole --store" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_workers_do_not_outlive_their_parent(start, scored):
    process = start("orphaned")
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert_resumed(scored, "orphaned")
