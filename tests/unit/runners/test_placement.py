from __future__ import annotations

import os

import pytest

from pear_data.errors import UsageError
from pear_data.runners.placement import worker_environments


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """`machine(gpus)`: four cores, nothing set, and so many GPUs as torch sees them."""

    def make(gpus):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)

    make(0)
    return make


def test_one_engine_is_left_as_it_is(machine):
    machine(4)
    assert worker_environments(1, 1) == [{}]


def test_cpu_workers_share_the_cores():
    assert worker_environments(2, 1) == [{"OMP_NUM_THREADS": "2"}] * 2
    assert worker_environments(8, 1) == [{"OMP_NUM_THREADS": "1"}] * 8


def test_a_number_of_threads_that_was_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert worker_environments(2, 1) == [{}, {}]


def test_every_worker_gets_gpus_of_its_own(machine):
    machine(4)
    found = worker_environments(2, 2)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == ["0,1", "2,3"]
    found = worker_environments(3, 1)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == ["0", "1", "2"]


def test_gpus_are_taken_from_those_that_were_made_visible(machine, monkeypatch):
    machine(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-3f,1")
    found = worker_environments(2, 1)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == ["5", "GPU-3f"]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_none(machine, monkeypatch, hidden):
    machine(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert worker_environments(2, 1) == [{"OMP_NUM_THREADS": "2"}] * 2


@pytest.mark.parametrize(("gpus", "workers", "tensor_parallel"), [(1, 2, 1), (3, 2, 2), (0, 1, 2)])
def test_too_few_gpus_are_refused(machine, gpus, workers, tensor_parallel):
    machine(gpus)
    with pytest.raises(UsageError, match=f"takes {workers * tensor_parallel} GPUs and {gpus} are visible"):
        worker_environments(workers, tensor_parallel)
