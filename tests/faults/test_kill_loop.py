"""A job of many shards killed at random moments, over and over: at most the shards in work are lost, ever."""

from __future__ import annotations

import random
import shutil
import signal
import time

import pytest
from small_job import STORE, assert_sound, content, write_corpus
from zygote import Zygote

from pear_data import open_store

SAMPLES = 30  # 10 shards
KILLS = 3


def committed(folder):
    """Of every file that the manifest has, what tells whether it was written again; all are whole."""
    if not (folder / STORE / "manifest.json").exists():
        return {}
    store = open_store(folder / STORE)
    assert not any(map(store.fault_of, store.manifest.files))
    paths = [store.path / entry.path for entry in store.manifest.files]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


def kill_over_and_over(folder, kills, samples=SAMPLES):
    """Kill the whole job `kills` times; (jobs that came to their end, committed files at all kills together)."""
    chance = random.Random(0)
    corpus = write_corpus(folder / "corpus", samples)
    done = ends = kept = 0
    with Zygote() as zygote:
        whole = shutil.copytree(corpus, folder / "whole")
        start = time.monotonic()
        assert zygote.run(whole)["status"] == 0
        usual = time.monotonic() - start
        while done < kills:
            work = shutil.copytree(corpus, folder / "work")
            status = None
            while status != 0:
                before = committed(work)
                later = chance.uniform(0, usual / 3) if done < kills else None
                status = zygote.run(work, kill_after=later)["status"]
                assert status in (0, -signal.SIGKILL)
                done += status != 0
                after = committed(work)
                assert {path: after.get(path) for path in before} == before
                kept += len(after) if status else 0
            ends += 1
            assert_sound(work)
            assert content(work) == content(whole)
            shutil.rmtree(work)
    return ends, kept


def test_a_few_kills(tmp_path):
    ends, kept = kill_over_and_over(tmp_path, KILLS)
    assert ends
    assert kept


@pytest.mark.kill_loop
def test_a_hundred_kills(tmp_path):
    kill_over_and_over(tmp_path, 100, 2 * SAMPLES)
