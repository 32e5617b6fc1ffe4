"""Weighting against the floor of copying, and against the per-sample loop of a script; tokens per second, peak memory.

    python tests/benchmarks/weighting.py                        # 40M tokens, 1 and 2 processes
    python tests/benchmarks/weighting.py --memory               # peak memory over 10M and 160M tokens
    python tests/benchmarks/weighting_queries.py                # common questions in SQL over 40M tokens

The floor reads the two log-prob columns and writes list columns of the same shape and encodings: real weights, of the
first row groups, in memory. It reads ahead and writes behind in threads, as weighting does, and does nothing else.
`checked` is the same with what a store promises: the sha256 of every file read or written, files synced to the disk.
Every method runs in the same warm processes, in turn, several rounds; ratios are medians of the rounds' own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from synthetic_store import make_store

from pear_data.allocator import stay_small, take_arrow_memory_from_heap
from pear_data.config import WeightSettings
from pear_data.schema import FLOATS, parquet_options
from pear_data.stages.weigh_shard import weigh_shard
from pear_data.stages.weight_job import Weighting, WeightJob
from pear_data.store import open_store
from pear_data.store.columns import flat_values
from pear_data.store.commit import atomic_path, sha256_of
from pear_data.store.manifest import CORPUS
from pear_data.weighting import CLIP_LOG_RATIO, CLIP_LOG_WEIGHT

LEVELS = ("token", "block", "sequence")
LOOP_SAMPLES = 100  # of the slow loop, which is timed by its tokens
COLUMN = pa.schema([pa.field("weights", FLOATS)])

Method = Callable[[WeightJob], int]


def jobs_of(store_folder: Path, levels: tuple[str, ...]) -> list[WeightJob]:
    store = open_store(store_folder)
    weightings = tuple(Weighting(WeightSettings.model_validate({"level": level})) for level in levels)
    return [
        WeightJob(
            root=store_folder,
            name=shard.name,
            target_policy="initial",
            behavior_policy="behavior",
            corpus=shard,
            target=store.stage("scores/initial").shard(shard.name),
            behavior=store.stage("scores/behavior").shard(shard.name),
            weightings=weightings,
        )
        for shard in store.stage(CORPUS).shards
    ]


def ours(job: WeightJob) -> int:
    return next(iter(weigh_shard(job).values())).num_scored


def floor(job: WeightJob, *, is_checked: bool = False) -> int:
    """Copy a shard: both log-prob columns in, one list column out for each weighting."""
    inputs = [job.root / job.target.file.path, job.root / job.behavior.file.path]
    outputs = [
        job.root / "floor" / weighting.settings.level / f"{job.name}.parquet" for weighting in job.weightings
    ]
    with contextlib.ExitStack() as stack:
        checks = stack.enter_context(ThreadPoolExecutor(1))
        if is_checked:
            hashed = [checks.submit(sha256_of, path) for path in inputs]
        lanes = []
        for weighting, output in zip(job.weightings, outputs, strict=True):
            options = parquet_options(COLUMN, in_runs=weighting.settings.level != "token")
            path = stack.enter_context(atomic_path(output)) if is_checked else output
            writer = stack.enter_context(pq.ParquetWriter(path, COLUMN, **options))
            lanes.append(
                (
                    writer,
                    real_weights(job.root, weighting.settings.level),
                    stack.enter_context(ThreadPoolExecutor(1)),
                )
            )
        tokens, writing = 0, []
        for target, _ in zip(*(stack.enter_context(ahead(path)) for path in inputs), strict=True):
            for done in writing:
                done.result()
            length = len(target.values)
            columns = [
                pa.ListArray.from_arrays(target.offsets, pa.array(values[:length]), type=FLOATS)
                for _, values, _ in lanes
            ]
            writing = [
                thread.submit(
                    writer.write_table, pa.table([column], schema=COLUMN), row_group_size=len(column)
                )
                for (writer, _, thread), column in zip(lanes, columns, strict=True)
            ]
            tokens += length
        for done in writing:
            done.result()
        if is_checked:
            [done.result() for done in hashed]
    if is_checked:
        [sha256_of(output) for output in outputs]
    return tokens


@contextlib.contextmanager
def ahead(path: Path) -> Iterator[Iterator[pa.ListArray]]:
    """The log-probs of a file's row groups, each read while the one before is in use."""
    with (
        ThreadPoolExecutor(1) as thread,
        pq.ParquetFile(path, pre_buffer=False) as parquet,
    ):

        def read(group: int) -> pa.ListArray:
            return parquet.read_row_group(group, columns=["logprobs"], use_threads=False)["logprobs"].chunk(0)

        def made() -> Iterator[pa.ListArray]:
            following = thread.submit(read, 0)
            for group in range(1, parquet.num_row_groups):
                array = following.result()
                following = thread.submit(read, group)
                yield array
            yield following.result()

        yield made()


_WEIGHTS: dict[tuple[Path, str], np.ndarray] = {}


def real_weights(root: Path, level: str) -> np.ndarray:
    """Weights of the first row groups, as ours made them: enough for any row group."""
    if (root, level) not in _WEIGHTS:
        with pq.ParquetFile(root / "weights" / level / "part-00000.parquet") as parquet:
            groups = range(min(2, parquet.num_row_groups))
            _WEIGHTS[root, level] = flat_values(
                parquet.read_row_groups(groups, columns=["weights"])["weights"]
            )
    return _WEIGHTS[root, level]


def torch_loop(job: WeightJob) -> tuple[int, float]:
    """Tokens and seconds of what scripts do: rows as Python lists, a tensor for each sample."""
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = [
        pq.ParquetFile(job.root / shard.file.path)
        .read_row_group(0, columns=["logprobs"])
        .slice(0, LOOP_SAMPLES)
        .to_pylist()
        for shard in (job.target, job.behavior)
    ]
    weights, log_gamma = [], float(np.log(0.999))
    for target, behavior in zip(*rows, strict=True):
        d = torch.tensor(target["logprobs"]) - torch.tensor(behavior["logprobs"])
        terms = d.clamp(*CLIP_LOG_RATIO).double() + log_gamma
        log_weight = terms.flip(0).cumsum(0).flip(0) - terms
        weights.append(log_weight.clamp(*CLIP_LOG_WEIGHT).exp().float().tolist())
    pq.write_table(
        pa.table({"weights": pa.array(weights, FLOATS)}), job.root / "loop.parquet", compression="zstd"
    )
    return sum(map(len, weights)), time.perf_counter() - start


def seconds(pool: ProcessPoolExecutor, method: Method, jobs: list[WeightJob]) -> tuple[float, int]:
    start = time.perf_counter()
    tokens = sum(pool.map(method, jobs))
    return time.perf_counter() - start, tokens


def compare(folder: Path, processes: int, rounds: int) -> None:
    print(
        f"\n{processes} process{'es' if processes > 1 else ''}; million tokens per second (x: seconds over the floor's)"
    )
    print(f"{'':24}{'floor':>8}{'checked':>9}{'ours':>8}{'x floor':>9}{'x checked':>11}")
    methods: dict[str, Method] = {"floor": floor, "checked": partial(floor, is_checked=True), "ours": ours}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=stay_small) as pool:
        for levels in (*((level,) for level in LEVELS), LEVELS):
            jobs = jobs_of(folder, levels)
            for weighting in jobs[0].weightings:
                (folder / "floor" / weighting.settings.level).mkdir(parents=True, exist_ok=True)
            for method in (
                ours,
                *methods.values(),
            ):  # the first run compiles, and makes the weights the floor writes
                list(pool.map(method, jobs))
            times: dict[str, list[float]] = {name: [] for name in methods}
            for _ in range(rounds):
                for name, method in methods.items():
                    spent, tokens = seconds(pool, method, jobs)
                    times[name].append(spent)
            ratios = {
                name: statistics.median(a / b for a, b in zip(times["ours"], times[name], strict=True))
                for name in ("floor", "checked")
            }
            speeds = [tokens / statistics.median(times[name]) / 1e6 for name in methods]
            label = levels[0] if len(levels) == 1 else "all three in one pass"
            print(
                f"{label:24}{speeds[0]:8.1f}{speeds[1]:9.1f}{speeds[2]:8.1f}{ratios['floor']:9.2f}{ratios['checked']:11.2f}",
                flush=True,
            )
        if processes == 1:
            jobs = jobs_of(folder, ("token",))
            own, tokens = min(seconds(pool, ours, jobs) for _ in range(rounds))
            looped, spent = pool.submit(torch_loop, jobs[0]).result()
            print(
                f"per-sample torch loop, token level: {looped / spent / 1e6:.2f} million tokens per second;",
                end=" ",
            )
            print(f"ours is {spent / looped / (own / tokens):.0f} times as fast")


def peak_memory(folder: Path, levels: tuple[str, ...]) -> float:
    """MiB of the largest process of `pear-data weight` over a whole store."""
    command = [
        sys.executable,
        "-m",
        "pear_data",
        "weight",
        "--store",
        str(folder),
        "--workers",
        "1",
        "--overwrite",
    ]
    command += [option for level in levels for option in ("--level", level)]
    command += ["--gamma", "0.99" if len(levels) > 1 else "0.999"]  # other weights each time
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_maxrss / 1024


def memory(scratch: Path) -> None:
    stores = {}
    for tokens in (10_000_000, 160_000_000):
        stores[tokens] = scratch / f"store-{tokens}"
        # Elsewhere, because a process begins with the peak of the one that starts it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(make_store, stores[tokens], tokens, shard_tokens=tokens // 2).result()
    for levels in (("token",), LEVELS):
        peaks = []
        for tokens, folder in stores.items():
            peaks.append(peak_memory(folder, levels))
            print(f"{', '.join(levels)}: {tokens / 1e6:.0f}M tokens: peak {peaks[-1]:.0f} MiB", flush=True)
        print(f"ratio {peaks[1] / peaks[0]:.2f}")


@click.command(help=__doc__)
@click.option("--tokens", default=40_000_000, show_default=True)
@click.option("--shards", default=4, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--processes", default=(1, 2), multiple=True, type=int, show_default=True)
@click.option("--memory", "measures_memory", is_flag=True, help="Peak memory instead of time.")
def main(tokens: int, shards: int, rounds: int, processes: tuple[int, ...], measures_memory: bool) -> None:
    take_arrow_memory_from_heap()
    with tempfile.TemporaryDirectory() as scratch:
        if measures_memory:
            memory(Path(scratch))
            return
        folder = Path(scratch) / "store"
        make_store(folder, tokens, shard_tokens=int(tokens / shards * 1.25))
        for count in processes:
            compare(folder, count, rounds)


if __name__ == "__main__":
    main()
