"""The state of a store for people: a table, and a line for each stage that somebody must see to."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.table import Table

from pear_data.stages.status import StageStatus, StoreStatus
from pear_data.stages.text import clock, one_line

_NUMBERS = ("shards", "left", "samples", "rejected", "tokens/s", "time left")


def status_table(status: StoreStatus) -> Table:
    """A row per stage."""
    table = Table(header_style="bold")
    table.add_column("stage", overflow="fold")
    table.add_column("state")
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for stage in status.stages:
        speed = stage.tokens_per_second
        table.add_row(
            stage.stage,
            stage.state,
            f"{stage.shards_done:,}",
            _left(stage),
            f"{stage.samples:,}",
            f"{stage.rejected:,}",
            "-" if speed is None else f"{speed:,.0f}",
            "-" if stage.seconds_left is None or stage.state == "done" else clock(stage.seconds_left),
        )
    return table


def status_lines(status: StoreStatus, now: datetime | None = None) -> list[str]:
    """Who writes, and how each stage that stopped goes on."""
    now = now or datetime.now(UTC)
    lines = ["Nothing writes to this store now." if status.writer is None else ""]
    if status.writer is not None:
        command = f": {status.writer.command}" if status.writer.command else ""
        lines = [f"Process {status.writer.process} writes to this store{command}"]
    for stage in status.stages:
        if stage.state == "running" and stage.last_words:
            lines.append(f"{stage.stage}, last said: {stage.last_words}")
        elif stage.state not in ("done", "running"):
            lines += _stopped(stage, now)
        if stage.unreadable_lines:
            lines.append(f"{stage.stage}: {stage.unreadable_lines:,} lines of its log cannot be read")
    return [one_line(line) for line in lines]


def _stopped(stage: StageStatus, now: datetime) -> list[str]:
    if stage.last_event is None:
        return [f"{stage.stage} is not finished; its log tells nothing: give the command that makes it again"]
    ago = clock(max(0.0, (now - stage.last_event).total_seconds()))
    why = f": {stage.last_words}" if stage.state == "failed" and stage.last_words else ""
    lines = [f"{stage.stage} stopped {ago} ago ({stage.state}){why}"]
    return [*lines, f"  resume with: {stage.resume}"] if stage.resume else lines


def _left(stage: StageStatus) -> str:
    if stage.shards_left is not None:
        return f"{stage.shards_left:,}"
    if stage.inputs:
        return f"file {min(stage.inputs, (stage.inputs_done or 0) + 1)} of {stage.inputs}"
    return "?"
