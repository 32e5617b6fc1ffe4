"""Engines in real child processes that die, raise and run out of memory on chosen samples."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import psutil
import pytest
from faulty_engines import Faulty, batch_of, logprobs_of, opened

from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.runners.local_host import LocalHost
from pear_data.runners.pool import ScorerPool
from pear_data.runners.supervised import SupervisedScorer


@contextlib.contextmanager
def supervised(engine, say=lambda line: None):
    scorer = SupervisedScorer(partial(LocalHost, engine, {}), say)
    try:
        yield scorer
    finally:
        scorer.close()
        assert not any(psutil.pid_exists(pid) for pid in opened(engine.folder))


def check(batch, scored, failed):
    """Everything but the failed samples has its log-probs, and they alone failed."""
    assert sorted(scored.failures) == failed
    good = [row for row in range(len(batch)) if row not in failed]
    for row in good:
        stretch = slice(*batch.scored_offsets[row : row + 2])
        np.testing.assert_array_equal(scored.logprobs[stretch], logprobs_of(batch)[stretch])


@pytest.mark.parametrize(
    ("trouble", "reason", "engines"),
    [
        ("raise", "RuntimeError: the kernel is broken", 5),
        ("refuse", "ValueError: a token id is outside the vocabulary", 1),
        ("exit", "its process exited with code 7; its last words: goodbye", 7),
        ("kill", "its process was killed by SIGKILL (was the machine out of memory?)", 7),
        ("no memory", "out of memory (MemoryError: no message)", 1),
        (
            "no cpu memory",
            "out of memory (RuntimeError: [enforce fail at",
            1,
        ),
        (
            "no gpu memory",
            "out of memory (OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB)",
            1,
        ),
        ("dead", "vLLM stopped scoring with m: EngineDeadError", 5),
    ],
)
def test_the_one_sample_at_fault_is_found(tmp_path, trouble, reason, engines):
    batch, counts = batch_of(8), []
    with supervised(Faulty(tmp_path, {"s5": trouble})) as scorer:
        scored = scorer.score(batch, counts.append)
        check(batch, scored, [5])
        assert scored.failures[5].startswith(reason)
        # 8, 4, 2 and 1 samples failed; a process that was lost may have been killed by anyone: two tries more.
        assert len(opened(tmp_path)) == engines
        assert sum(counts) == batch.num_tokens.sum()
        check(batch_of(4), scorer.score(batch_of(4), counts.append), [])


@pytest.mark.parametrize("trouble", ["exit", "no memory"])
def test_several_in_one_batch_the_first_and_the_last_among_them(tmp_path, trouble):
    batch, counts = batch_of(9), []
    with supervised(Faulty(tmp_path, dict.fromkeys(["s0", "s3", "s4", "s8"], trouble))) as scorer:
        check(batch, scorer.score(batch, counts.append), [0, 3, 4, 8])
    assert sum(counts) == batch.num_tokens.sum()


def test_a_process_killed_from_outside_costs_no_sample(tmp_path):
    said = []
    with supervised(Faulty(tmp_path, {"s0": "kill once"}), said.append) as scorer:
        check(batch_of(1), scorer.score(batch_of(1), lambda count: None), [])
    assert len(opened(tmp_path)) == 2
    reason = "its process was killed by SIGKILL (was the machine out of memory?)"
    assert said == [f"The engine failed ({reason}) and is started again."]


@pytest.mark.parametrize("trouble", ["exit", "no memory"])
def test_an_engine_that_fails_on_everything_quarantines_nothing(tmp_path, trouble):
    with (
        supervised(Faulty(tmp_path, everything=trouble)) as scorer,
        pytest.raises(
            PearError, match=r"faulty failed on 3 samples in a row, the last of them s2: .*mend that"
        ),
    ):
        scorer.score(batch_of(6), lambda count: None)


def test_three_in_a_row_count_over_batches_and_a_success_between_them_counts(tmp_path):
    with supervised(Faulty(tmp_path, dict.fromkeys(["s0", "s1", "s3", "s4"], "refuse"))) as scorer:
        check(batch_of(5), scorer.score(batch_of(5), lambda count: None), [0, 1, 3, 4])
        with pytest.raises(PearError, match="the last of them s0"):
            scorer.score(batch_of(1), lambda count: None)


def test_our_errors_pass_as_they_are(tmp_path):
    with supervised(Faulty(tmp_path, {"s1": "usage"})) as scorer:
        with pytest.raises(UsageError, match="choose another") as caught:
            scorer.score(batch_of(3), lambda count: None)
        assert str(caught.value) == "--dtype float16: choose another"
        assert "in happen" in caught.value.__notes__[0]
        check(batch_of(1), scorer.score(batch_of(1), lambda count: None), [])
    assert len(opened(tmp_path)) == 1


@pytest.mark.parametrize(("trouble", "given"), [("short", 19), ("long", 21)])
def test_a_wrong_number_of_values_is_refused(tmp_path, trouble, given):
    with (
        supervised(Faulty(tmp_path, {trouble: ""})) as scorer,
        pytest.raises(
            PearError, match=rf"faulty gave {given} log-probs for 20 scored tokens from sample s0 on"
        ),
    ):
        scorer.score(batch_of(5), lambda count: None)


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("usage", UsageError, "--dtype float16: choose another"),
        ("dead", PearError, "vLLM stopped scoring with m: EngineDeadError"),
        ("raise", PearError, "the engine does not start: RuntimeError: the kernel is broken"),
        (
            "exit",
            PearError,
            "the engine ended before its model was loaded: its process exited with code 7; its last words: goodbye; "
            "VLLM_LOGGING_LEVEL=INFO shows what it writes",
        ),
    ],
)
def test_an_engine_that_does_not_start(tmp_path, trouble, kind, message):
    with supervised(Faulty(tmp_path, at_start=(trouble,))) as scorer:
        with pytest.raises(kind) as caught:
            scorer.ready()
        assert type(caught.value) is kind
        assert str(caught.value) == message


def test_an_engine_that_comes_back_as_another_one_ends_the_job(tmp_path):
    engine = Faulty(tmp_path, {"s1": "exit"}, models=("m", "other"))
    with supervised(engine) as scorer, pytest.raises(MismatchError, match='model: was "m", now "other"'):
        scorer.score(batch_of(3), lambda count: None)


def test_a_worker_that_cannot_come_back_leaves_its_batch_to_another(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    broken = Faulty(tmp_path / "one", {"s1": "exit"}, at_start=("", "raise", "raise"))
    sound = Faulty(tmp_path / "two")
    said, counts = [], []
    with supervised(broken) as first, supervised(sound) as second:
        pool = ScorerPool([second, first], said.append)
        assert pool.ready().sentence == "A faulty engine."
        check(batch_of(3), pool.score(batch_of(3), counts.append), [])
        assert sum(counts) == batch_of(3).num_tokens.sum()
        assert len(said) == 1
        assert "exited with code 7" in said[0]
        assert said[0].endswith("the kernel is broken; going on with 1 of 2 workers")
        check(batch_of(3), pool.score(batch_of(3), counts.append), [])
        broken_alone = ScorerPool([first], said.append)
        with pytest.raises(PearError, match="cannot be started again"):
            broken_alone.score(batch_of(3), counts.append)


def test_workers_that_would_give_other_numbers_are_refused(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with (
        supervised(Faulty(tmp_path / "one")) as one,
        supervised(Faulty(tmp_path / "two", models=("n",))) as two,
        pytest.raises(
            MismatchError, match=r'workers would not give the same numbers \(model: was "m", now "n"\)'
        ),
    ):
        ScorerPool([one, two], print).ready()


def wait_for(path):
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(path.read_text())


def test_closing_ends_an_engine_at_work_and_what_it_started(tmp_path):
    engine = Faulty(tmp_path, everything="hang")
    caught = []

    def score():
        try:
            scorer.score(batch_of(3), lambda count: None)
        except PearError as error:
            caught.append(str(error))

    with supervised(engine) as scorer:
        scorer.ready()
        thread = threading.Thread(target=score)
        thread.start()
        grandchild = wait_for(tmp_path / "hanging")
        start = time.monotonic()
        scorer.close()
        thread.join(5)
        assert time.monotonic() - start < 5
        assert caught == ["the engine was closed while it scored"]
        assert gone(grandchild)


def test_an_engine_that_was_closed_says_so(tmp_path):
    with supervised(Faulty(tmp_path)) as scorer:
        scorer.ready()
        scorer.close()
        with pytest.raises(PearError, match="was closed while it scored"):
            scorer.score(batch_of(3), lambda count: None)


PARENT = """
import sys
from functools import partial
from pathlib import Path
from faulty_engines import Faulty, batch_of
from pear_data.runners.local_host import LocalHost
from pear_data.runners.supervised import SupervisedScorer

engine = Faulty(Path(sys.argv[1]), everything="hang")
SupervisedScorer(partial(LocalHost, engine, {}), print).score(batch_of(3), print)
"""


def test_nothing_outlives_a_parent_that_is_killed(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=environment)
    try:
        grandchild = wait_for(tmp_path / "hanging")
        (child,) = opened(tmp_path)
        assert psutil.pid_exists(child)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert gone(child)
    assert gone(grandchild)


def gone(pid):
    """Whether a process ends within a few seconds; one that is only not reaped yet counts as ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False
