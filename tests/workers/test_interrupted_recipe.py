"""A recipe interrupted while its engine loads, all its processes and twice; what is printed resumes it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from pear_data import open_store
from pear_data.demo import asset
from pear_data.store.log import read_log

RECIPE = {
    "steps": [
        {"ingest": {"corpus": [str(asset("corpus"))], "tokenizer": str(asset("initial")), "limit": 40}},
        {"score": {"policy": "initial", "engine": "transformers"}},
    ]
}


@pytest.fixture
def environment(tmp_path):
    """The model and the store are given by the environment alone; the recipe's name needs quotes."""
    (tmp_path / "it's a recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PEAR_")},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PEAR_STORE": "a store",
        "PEAR_SCORE_MODEL": str(asset("initial")),
    }


def test_interrupted_while_the_model_loads(tmp_path, environment):
    command = [sys.executable, "-m", "pear_data", "run", "it's a recipe.yaml"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    engine = wait_for_engine(process)
    engine.terminate()  # as a batch system sends it to every process of a job, in any order
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert not psutil.wait_procs([engine], timeout=10)[1]
    assert "Traceback" not in errors
    assert "The engine failed" not in errors
    store = tmp_path / "a store"
    assert not list(store.rglob("*.tmp"))

    shown = errors.splitlines()[-1].partition("Resume with: ")[2]
    status = json.loads(run("pear-data status", tmp_path, environment))
    corpus, initial = status["stages"]
    assert status["writer"] is None
    assert (corpus["state"], initial["state"], initial["shards_left"]) == ("done", "interrupted", 1)
    assert initial["resume"] == shown
    for name in [name for name in environment if name.startswith("PEAR_")]:
        del environment[name]
    run(shown, tmp_path, environment)
    assert open_store(store).complete_stage("scores/initial")
    ends = [event.outcome for event in read_log(store, "scores/initial") if event.event == "ended"]
    assert ends == ["interrupted", "done"]


def run(line, folder, environment):
    """Run what a shell makes of a command line."""
    line = line.replace("pear-data", shlex.join([sys.executable, "-m", "pear_data"]), 1)
    done = subprocess.run(
        line,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for_engine(process):
    """The child process that loads the model, soon after its start."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        for child in psutil.Process(process.pid).children():
            if "pear_data.runners.child" in child.cmdline():
                time.sleep(0.5)
                return child
        time.sleep(0.01)
    raise AssertionError("no engine was started")
