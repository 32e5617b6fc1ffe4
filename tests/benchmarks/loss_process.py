"""A method of tests/benchmarks/loss.py in a process of its own, where its time and memory are nobody else's."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from loss_methods import MissingError, Problem, Shape, Step, exact_gradients, step_of
from torch import Tensor

TINY = Shape(64, 512, 64)
TILE = 4096  # rows of a gradient that are compared at once


@dataclass(frozen=True)
class Error:
    """Of a gradient against float64: root mean square by root mean square, largest by largest entry."""

    rms: float
    largest: float


Gradients = dict[str, Error]


@dataclass(frozen=True)
class Measured:
    """`seconds` of a step in each round, bytes of memory beyond the inputs, errors; the floor has no gradients."""

    seconds: tuple[float, ...]
    peak: int
    gradients: Gradients | None

    def time_over(self, other: Measured) -> float:
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


class MethodProcess:
    """`reason`: that the method cannot run here or failed, and why; or None."""

    def __init__(self, method: str, exact: Path, *case: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, method, exact, *case), daemon=True)
        self._process.start()
        theirs.close()
        self.reason: str | None = None
        self.peak = 0
        self.gradients: Gradients | None = None
        first = self._pipe.recv()
        if isinstance(first, str):
            self.reason = first
        else:
            self.peak, self.gradients = first

    def run(self, steps: int) -> float:
        """Seconds of a step."""
        self._pipe.send(steps)
        seconds: float = self._pipe.recv()
        return seconds

    def close(self) -> None:
        if not self.reason:
            self._pipe.send(0)
        self._process.join(60)
        self._process.kill()


def save_exact_gradients(path: Path, *case: object) -> None:
    """In a process that ends, and its memory with it."""
    process = multiprocessing.get_context("spawn").Process(target=_save_exact, args=(path, *case))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the float64 gradients failed with {process.exitcode}")


def _save_exact(path: Path, shape: Shape, dtype: str, device: str, masked: float, threads: int) -> None:
    torch.set_num_threads(threads)
    problem = shape.problem(getattr(torch, dtype), device, masked)
    torch.save({name: one.cpu() for name, one in exact_gradients(problem).items()}, path)


def _serve(
    pipe: Connection,
    method: str,
    exact: Path,
    shape: Shape,
    dtype: str,
    device: str,
    masked: float,
    threads: int,
) -> None:
    """Sends peak and errors of a first step, then the seconds of a step for each number of steps it is sent."""
    torch.set_num_threads(threads)
    try:
        tiny = TINY.problem(getattr(torch, dtype), device, masked)
        step_of(method, tiny)()
        del tiny
        problem = shape.problem(getattr(torch, dtype), device, masked)
        step = step_of(method, problem)
        peak = peak_of(step, device)
        pipe.send((peak, None if method == "floor" else _errors(problem, exact)))
    except MissingError as reason:
        pipe.send(f"not run: {reason}")
        return
    except Exception as error:
        # One that fails here must not end the others' run.
        pipe.send(f"failed: {type(error).__name__}: {error}")
        return
    problem.forget_gradients()
    while steps := pipe.recv():
        if device == "cuda":
            step()  # wakes the clocks
        pipe.send(_seconds(step, steps, device))
        problem.forget_gradients()


def _seconds(step: Step, steps: int, device: str) -> float:
    _finish(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _finish(device)
    return (time.perf_counter() - start) / steps


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_of(step: Step, device: str) -> int:
    """Bytes of a step beyond what was there before it."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def _errors(problem: Problem, exact: Path) -> Gradients:
    right = torch.load(exact, mmap=True, map_location="cpu")
    return {
        name: error_of(one.grad, right[name])
        for name, one in (("hidden", problem.hidden), ("head", problem.head))
        if one.grad is not None
    }


def error_of(found: Tensor, right: Tensor) -> Error:
    """In tiles, on the device of `found`."""
    wrong = size = largest_wrong = largest = 0.0
    for start in range(0, len(right), TILE):
        expected = right[start : start + TILE].to(found.device)
        difference = found[start : start + TILE].double() - expected
        wrong += float(difference.square().sum())
        size += float(expected.square().sum())
        largest_wrong = max(largest_wrong, float(difference.abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return Error((wrong / size) ** 0.5, largest_wrong / largest)
