"""Work on independent shards in several processes, here or on a Ray cluster; files stay where they are."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal, TypeVar

from pear_data.allocator import stay_small, take_arrow_memory_from_heap
from pear_data.errors import PearError
from pear_data.runners.base import EngineLostError
from pear_data.runners.leaving import leave_signals_to_parent
from pear_data.store.manifest import MANIFEST_NAME

Job = TypeVar("Job")
Result = TypeVar("Result")

# A process takes about a second to start, which a core needs for as many tokens.
TOKENS_WORTH_A_PROCESS = 20_000_000
# Beyond that the memory of a process counts for more than its start does.
TOKENS_DONE_HERE = 4_000_000
# Several share a disk; more than this seldom help, and each takes up to 300 MB.
DEFAULT_WORKERS = 8
RAY_RETRIES = 3


def default_workers(shards: int, tokens: int) -> int:
    """Processes worth having at work here for so many shards and tokens."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, DEFAULT_WORKERS, shards, -(-tokens // TOKENS_WORTH_A_PROCESS)))


def run_shards(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    tokens: int,
    workers: int,
    runner: Literal["local", "ray"],
    ray_address: str | None,
    root: Path,
) -> Generator[Result, None, None]:
    """The results of `work` on every job, as they come. After an error the rest is not begun.

    Args:
        work: a function of a module; it and the jobs travel to other processes.
        tokens: what all jobs hold; few of them are worked on in this process, where one worker is asked for.
        root: the store that the jobs read and write, on Ray under the same path on every node.

    Raises:
        PearError: as `work` raises it; a process was killed; there is no cluster, or a node does not see `root`.
    """
    if runner == "ray":
        return _on_ray(work, jobs, workers, ray_address, root)
    if workers == 1 and tokens <= TOKENS_DONE_HERE:
        return (work(job) for job in jobs)
    return _in_processes(work, jobs, workers)


def _in_processes(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Generator[Result, None, None]:
    take_arrow_memory_from_heap()
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks without the threads
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_begin_worker)
    try:
        for done in as_completed([pool.submit(work, job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool:
        raise PearError(
            "a worker was killed (was the machine out of memory?): run the same command again, with fewer --workers; "
            "finished shards are kept"
        ) from None
    finally:
        # Shards in work are brought to their end, which takes seconds, and nothing is left running.
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    stay_small()
    leave_signals_to_parent()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _on_ray(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, address: str | None, root: Path
) -> Generator[Result, None, None]:
    from pear_data.runners.ray_host import cluster_errors, ray_cluster

    with ray_cluster(address, gpus=0) as resources:
        import ray

        task = ray.remote(_answer).options(**resources, scheduling_strategy="SPREAD", max_retries=RAY_RETRIES)
        waiting = list(reversed(jobs))
        running: list[ray.ObjectRef] = []
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(task.remote(work, root.absolute(), waiting.pop()))
                finished, running = ray.wait(running)
                with cluster_errors():
                    answer = ray.get(finished[0])
                if isinstance(answer, PearError):
                    raise answer
                yield answer
        except EngineLostError as error:
            raise PearError(f"{error}: run the same command again; finished shards are kept") from None
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _answer(work: Callable[[Job], Result], root: Path, job: Job) -> Result | PearError:
    """What a Ray task returns; an error of ours as a value, which Ray would wrap."""
    if not (root / MANIFEST_NAME).is_file():
        return PearError(
            f"node {socket.gethostname()} does not see {root}: put the store on a file system that all nodes share, or "
            "use --runner local"
        )
    try:
        return work(job)
    except PearError as error:
        return error
