"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from rich.table import Table

from pear_data.stages.plan import Plan

_STEPS = ("", "k", "M", "G", "T", "P", "E", "Z")


def plan_table(plan: Plan) -> Table:
    """What there is, what is left to do, what does it, what it costs."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for part in (_corpus(plan), _engine(plan), _costs(plan)):
        for label, value in part:
            table.add_row(label, value)
        table.add_section()
    return table


def _corpus(plan: Plan) -> Iterator[tuple[str, str]]:
    whole, left = plan.whole, plan.left
    yield "samples", f"{whole.samples:,}"
    yield "tokens", f"{whole.tokens:,}"
    yield "scored tokens", f"{whole.scored:,} ({_share(whole.scored, whole.tokens)})"
    yield "longest sample", f"{whole.longest:,} tokens"
    yield "too long to score", f"{whole.too_long:,} samples, of more than {plan.max_length:,} tokens"
    yield "left to score", f"{plan.shards_left} of {plan.shards} shards, {left.run_tokens:,} tokens"


def _engine(plan: Plan) -> Iterator[tuple[str, str]]:
    identity, size = plan.identity, plan.size
    yield "engine", "{engine} {engine_version}, {dtype} on {device}".format(**identity)
    shared = "" if size.head else ", which is the head too"
    head = f", head {size.head:,}" if size.head else ""
    yield (
        "parameters",
        f"{size.parameters:,} (layers {size.body:,}, embedding {size.embedding:,}{shared}{head})",
    )
    memory = plan.memory
    quantised = "at most " if identity.get("quantization") else ""
    parts = [f"weights {quantised}{_bytes(memory.weights)}", f"activations {_bytes(memory.activations)}"]
    parts.append(f"logits {_bytes(memory.logits)}")
    if memory.kv_longest:
        parts.append(f"keys and values of the longest sample {_bytes(memory.kv_longest)}")
    # vLLM's cache of keys and values takes whatever else there is.
    yield (
        "memory",
        f"{'at least' if memory.kv_longest else 'about'} {_bytes(memory.total)} ({', '.join(parts)})",
    )


def _costs(plan: Plan) -> Iterator[tuple[str, str]]:
    left = plan.left
    yield "forward passes", f"about {left.forward_passes:,} of up to {plan.forward_tokens:,} tokens"
    flops = left.flops
    if flops.total:
        shares = ", ".join(
            f"{name} {_share(part, flops.total)}"
            for name, part in (("layers", flops.body), ("attention", flops.attention), ("head", flops.head))
        )
        yield "compute", f"{_scaled(flops.total)}FLOP ({shares})"
    if plan.calibration is not None and plan.flops_per_second is not None and plan.seconds is not None:
        timed = plan.calibration
        yield (
            "speed",
            f"{timed.tokens_per_second:,.0f} tokens/s, {_scaled(plan.flops_per_second)}FLOP/s (measured: "
            f"{timed.num_tokens.sum():,} tokens in {timed.seconds:.1f} s)",
        )
        yield "time", f"{_clock(plan.seconds)} with {_workers(plan)}"
    yield "disk space", f"{_bytes(plan.disk_bytes)} at most"


def _workers(plan: Plan) -> str:
    if plan.workers == 1:
        return "1 worker"
    if plan.speedup == plan.workers:
        return f"{plan.workers} workers"
    return f"{plan.workers} workers, which share this machine's cores"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _bytes(count: int) -> str:
    return f"{_scaled(count)}B"


def _scaled(value: float) -> str:
    """Three digits and the prefix of a unit: 1.23 M."""
    step = 0
    while value >= 999.5 and step < len(_STEPS) - 1:
        value /= 1000
        step += 1
    return f"{value:.3g} {_STEPS[step]}"


def _clock(seconds: float) -> str:
    return "under a second" if seconds < 1 else str(timedelta(seconds=round(seconds)))
