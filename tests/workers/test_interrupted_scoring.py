"""Real processes scoring the demo corpus with a real model, killed, interrupted and run twice at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pear_data import open_store
from pear_data.demo import asset

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHARD_TOKENS = "1500"


def command(store: Path, *extra: str) -> list[str]:
    model = str(asset("initial"))
    score = ["score", str(asset("corpus")), "--model", model, "--engine", "transformers", "--limit", "150"]
    return [
        sys.executable,
        "-m",
        "pear_data",
        *score,
        "--shard-tokens",
        SHARD_TOKENS,
        "--store",
        str(store),
        *extra,
    ]


def start(store: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command(store), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def committed(store: Path) -> dict[str, tuple[int, int]]:
    """Of each committed shard of scores, what tells whether its file was written again."""
    try:
        stage = json.loads((store / "manifest.json").read_text())["stages"]["scores/initial"]
    except (FileNotFoundError, KeyError):
        return {}
    files = [store / shard["file"]["path"] for shard in stage["shards"]]
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def wait_for_shards(store: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 120
    while len(committed(store)) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def content(store: Path) -> list[dict]:
    return open_store(store).scores["initial"].to_table().to_pylist()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    store = tmp_path_factory.mktemp("whole") / "store"
    subprocess.run(command(store), env=ENVIRONMENT, check=True, timeout=300, capture_output=True)
    return content(store)


def test_sigkill_in_the_middle_costs_at_most_a_shard(tmp_path, uninterrupted):
    store = tmp_path / "store"
    for shards in (1, 4):
        process = start(store)
        wait_for_shards(store, process, shards)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before = committed(store)
        assert not json.loads((store / "manifest.json").read_text())["stages"]["scores/initial"]["complete"]
    subprocess.run(command(store), env=ENVIRONMENT, check=True, timeout=300, capture_output=True)
    after = committed(store)
    assert len(before) < len(after)
    assert {name: after[name] for name in before} == before
    assert content(store) == uninterrupted
    assert not list(store.rglob("*.tmp"))


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_130_and_says_how_to_resume(tmp_path, signal_number):
    store = tmp_path / "store"
    process = start(store)
    wait_for_shards(store, process, 1)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Resume with: pear-data score" in errors
    assert "Traceback" not in errors
    assert not list(store.rglob("*.tmp"))


def test_of_two_at_once_the_second_leaves_and_the_first_is_unharmed(tmp_path, uninterrupted):
    store = tmp_path / "store"
    first = start(store)
    wait_for_shards(store, first, 1)
    first.send_signal(signal.SIGSTOP)
    try:
        second = subprocess.run(
            command(store), env=ENVIRONMENT, check=False, capture_output=True, text=True, timeout=120
        )
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert f"is being written by process {first.pid}" in second.stderr
    first.communicate(timeout=300)
    assert first.returncode == 0
    assert content(store) == uninterrupted
