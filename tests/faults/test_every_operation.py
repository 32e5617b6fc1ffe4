"""Every operation on the disk of the whole job fails once, and the job is killed before every one of them."""

from __future__ import annotations

import errno
import itertools
import os
import shutil

import pytest
from injection import crash_states, fail_at
from small_job import STEPS, assert_sound, assert_whole, content, make_states

from pear_data.errors import PearError

# Scoring with a model takes the same way to the disk as recorded log-probs do; it is slower.
STRIDES = {name: 10 if name in ("score with a model", "score with failures") else 1 for name in STEPS}
# What is left behind by a kill differs little from one operation to the next: campaign.py tries each.
KILL_STRIDE = 3


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    return make_states(tmp_path_factory.mktemp("states"))


def after(states, step):
    """What the job is when a step is done."""
    names = list(states)
    return content(states[names[names.index(step) + 1]])


def assert_redone(folder, step, wanted):
    """The step run again makes of what is there what it makes of an undisturbed job."""
    STEPS[step](folder)
    assert content(folder) == wanted


def fail_every(states, step, folder, stride=1):
    """Let the 1st, 2nd, ... operation of a step fail until it runs through; how many there were."""
    wanted = after(states, step)
    for number in itertools.count(1, stride):
        work = shutil.copytree(states[step], folder / str(number))
        refusal = None
        with fail_at(number) as operations:
            try:
                STEPS[step](work)
            except PearError as error:
                refusal = error
        if refusal is None:
            assert len(operations) < number
            assert content(work) == wanted
            return number - 1
        assert refusal.exit_code == 1
        assert str(refusal).startswith(f"cannot write {operations[-1][1]}: {os.strerror(errno.ENOSPC)} (")
        assert str(refusal).endswith("free space or choose another place, then run the same command again")
        assert "\n" not in str(refusal)
        assert not [path for path in work.rglob("*") if path.suffix == ".tmp"]
        assert_whole(work)
        assert_redone(work, step, wanted)
        shutil.rmtree(work)
    raise AssertionError


def kill_every(states, step, folder, stride=1):
    """Go on from what a process leaves that is killed before the 1st, 2nd, ... operation; how many there were."""
    wanted = after(states, step)
    work = shutil.copytree(states[step], folder / "work")
    with crash_states(work, folder / "killed") as left:
        STEPS[step](work)
    for killed in left[::stride]:
        assert_sound(killed)
        assert_redone(killed, step, wanted)
        shutil.rmtree(killed)
    return len(left)


@pytest.mark.parametrize("step", STEPS)
def test_every_operation_fails_once(states, tmp_path, step):
    assert fail_every(states, step, tmp_path, STRIDES[step]) > 20


@pytest.mark.parametrize("step", STEPS)
def test_the_job_is_killed_before_every_operation(states, tmp_path, step):
    assert kill_every(states, step, tmp_path, STRIDES[step] * KILL_STRIDE) > 20
