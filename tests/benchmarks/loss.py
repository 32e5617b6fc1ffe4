"""The weighted loss: full logits, torch's, Liger's, TRL's and CCE's heads and ours; time, peak memory, gradient error.

    python tests/benchmarks/loss.py                   # CPU, float32, the same with 35 % of the rows masked, bfloat16;
                                                      # then what live weights add to a training step
    python tests/benchmarks/loss.py --dtype bfloat16 --masked 0.35 --no-live
    python tests/benchmarks/loss.py --device cuda     # 8,192 rows x 151,936 x 4,096 in bfloat16

One step is forward and backward, from hidden states and a head to the gradients of both. Every method runs in a
process of its own; the rounds are interleaved (A, B, C, A, B, C, ...), ratios are medians of the rounds' own. Peak
memory is what a step takes beyond its inputs, gradients included: resident memory on a CPU, after a tiny step has
loaded the method's code; the allocator's on CUDA. The floor is the three matrix products and nothing else. Errors are
against float64 gradients from the same inputs: the root of the mean square, and the largest, by those of the gradient.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from loss_methods import METHODS, Shape
from loss_process import Gradients, Measured, MethodProcess, save_exact_gradients
from rich.console import Console
from rich.progress import track
from rich.table import Table

SHAPES = {"cpu": Shape(4096, 49_152, 576), "cuda": Shape(8192, 151_936, 4096)}
CASES = {
    "cpu": [("float32", 0.0), ("float32", 0.35), ("bfloat16", 0.0)],
    "cuda": [("bfloat16", 0.0), ("bfloat16", 0.35)],
}
STEPS = {"cpu": 1, "cuda": 5}  # to a round
BASELINE = "full logits"


@dataclass(frozen=True)
class Case:
    shape: Shape
    dtype: str
    device: str
    masked: float

    def __str__(self) -> str:
        shape = self.shape
        return (
            f"{self.device}, {self.dtype}: {shape.rows:,} rows, vocabulary {shape.vocabulary:,}, "
            f"width {shape.width:,}, {self.masked:.0%} of the rows masked"
        )


def compare(
    case: Case, methods: list[str], rounds: int, threads: int, console: Console
) -> dict[str, Measured]:
    """Runs a case and prints its table."""
    with tempfile.TemporaryDirectory() as scratch:
        exact = Path(scratch) / "exact.pt"
        arguments = (case.shape, case.dtype, case.device, case.masked, threads)
        save_exact_gradients(exact, *arguments)
        processes = {method: MethodProcess(method, exact, *arguments) for method in methods}
        missing = {method: process.reason for method, process in processes.items() if process.reason}
        running = {method: process for method, process in processes.items() if not process.reason}
        seconds: dict[str, list[float]] = {method: [] for method in running}
        for _ in track(range(rounds), "rounds", console=Console(stderr=True), transient=True):
            for method, process in running.items():
                seconds[method].append(process.run(STEPS[case.device]))
        found = {
            method: Measured(tuple(seconds[method]), process.peak, process.gradients)
            for method, process in running.items()
        }
        for process in processes.values():
            process.close()
    console.print(f"\n{case}; {threads} thread{'s' if threads > 1 else ''}, {rounds} rounds")
    console.print(_table(found))
    for method, reason in missing.items():
        console.print(f"{method}: {reason}", markup=False)
    return found


def _table(found: dict[str, Measured]) -> Table:
    table = Table()
    headings = (
        "method",
        "seconds",
        "x full",
        "x floor",
        "peak MiB",
        "x full",
        "error, hidden",
        "error, head",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, one in found.items():
        whole = found.get(BASELINE)
        has_memory = one.gradients is not None  # the floor's buffers are no method's
        table.add_row(
            name,
            f"{statistics.median(one.seconds):.3f}",
            f"{one.time_over(whole):.2f}" if whole else "",
            f"{one.time_over(found['floor']):.2f}" if "floor" in found else "",
            f"{one.peak / 2**20:,.0f}" if has_memory else "",
            f"{one.peak / whole.peak:.2f}" if whole and has_memory else "",
            *(_errors(one.gradients, name) for name in ("hidden", "head")),
        )
    return table


def _errors(gradients: Gradients | None, name: str) -> str:
    return "" if gradients is None else f"{gradients[name].rms:.1e} / {gradients[name].largest:.1e}"


def print_targets(case: Case, found: dict[str, Measured], console: Console) -> None:
    """What the project promised of ours, beside what was found."""
    ours = found.get("ours")
    if ours is None:
        return
    time = {name: ours.time_over(other) for name, other in found.items()}
    bounds: list[tuple[str, float | None, float]] = []
    if case.device == "cuda":
        bounds = [
            ("x the floor", time.get("floor"), 1.5),
            ("GiB", ours.peak / 2**30, 6.0),
            ("x TRL's head", time.get("trl"), 0.9),
            ("x Liger's 'none'", time.get("liger"), 0.4),
        ]
    elif case.masked:
        bounds = [("x full logits' time", time.get(BASELINE), 0.6)]
    elif case.dtype == "float32":
        whole = found.get(BASELINE)
        bounds = [
            ("x full logits' time", time.get(BASELINE), 0.9),
            ("x their memory", ours.peak / whole.peak if whole else None, 0.2),
        ]
    bounds += _bounds_of_errors(case, found)
    console.print("ours: " + "; ".join(_judged(words, value, bound) for words, value, bound in bounds))


def _bounds_of_errors(case: Case, found: dict[str, Measured]) -> list[tuple[str, float | None, float]]:
    """Against float64 in float32, against full logits' own error in 16 bits."""
    ours, whole = found["ours"].gradients, found[BASELINE].gradients if BASELINE in found else None
    assert ours is not None
    if case.dtype == "float32" and case.device == "cpu":
        return [("largest error", max(one.largest for one in ours.values()), 1e-6)]
    if whole is None:
        return []
    # The same roundings in another order of sums: alike to two decimals.
    return [
        (f"x full logits' error, {name}", round(ours[name].rms / whole[name].rms, 2), 1.0) for name in ours
    ]


def _judged(words: str, value: float | None, bound: float) -> str:
    if value is None:
        return f"{words}: not run (target {bound:g})"
    shown = f"{value:.1e}" if bound < 1e-3 else f"{value:.2f}"
    return f"{shown} {words} (target {bound:g}: {'met' if value <= bound else 'MISSED'})"


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", "dtypes", type=click.Choice(["float32", "bfloat16", "float16"]), multiple=True)
@click.option("--masked", type=float, multiple=True, help="Share of rows.")
@click.option("--rows", type=int)
@click.option("--vocabulary", type=int)
@click.option("--width", type=int)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--live/--no-live", default=True, help="On a CPU: what live weights add to a training step.")
def main(
    device: str,
    dtypes: tuple[str, ...],
    masked: tuple[float, ...],
    rows: int | None,
    vocabulary: int | None,
    width: int | None,
    methods: str,
    rounds: int,
    threads: int,
    live: bool,
) -> None:
    console = Console(width=120)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise click.UsageError("there is no CUDA device here")
        console.print(torch.cuda.get_device_name())
    usual = SHAPES[device]
    shape = Shape(rows or usual.rows, vocabulary or usual.vocabulary, width or usual.width)
    chosen = list(itertools.product(dtypes or (CASES[device][0][0],), masked or (0.0,)))
    for dtype, share in chosen if dtypes or masked else CASES[device]:
        case = Case(shape, dtype, device, share)
        print_targets(case, compare(case, methods.split(","), rounds, threads, console), console)
    if live and device == "cpu":
        # Here, because every process of a method imports this file, and transformers is a large import.
        from live_step import print_live_overhead

        print_live_overhead(console, threads)


if __name__ == "__main__":
    main()
