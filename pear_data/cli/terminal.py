"""Progress on stderr: a bar on a terminal, a line per shard otherwise."""

from __future__ import annotations

import time
from typing import BinaryIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pear_data.redaction import redacted
from pear_data.stages.text import clock, one_line, printable


class TerminalProgress:
    """A `pear_data.progress.Progress` for people at a terminal or reading a log."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total: int | None = None
        self._title = self._unit = ""
        self._done = self._earlier = 0
        self._start = time.monotonic()

    def say(self, line: str) -> None:
        self._console.print(one_line(redacted(line)), soft_wrap=True)

    def note(self, line: str) -> None: ...

    def begin(self, title: str, total: int | None, unit: str, *, done: int = 0) -> None:
        self._title = title
        self._total, self._unit, self._done, self._earlier = total, unit, done, done
        self._start = time.monotonic()
        if not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, speed="")
        self._bar.start()

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, speed=f"{self._speed():,.0f} {self._unit}/s")

    def shard(self, name: str, note: str, *, seconds: float | None = None, worker: int | None = None) -> None:
        line = f"{self._title} {name}: {note}, {self._speed():,.0f} {self._unit}/s"
        if self._total is not None and self._speed() > 0:
            left = (self._total - self._done) / self._speed()
            line += f", {clock(max(0.0, left))} left"
        if self._bar is None:
            click.echo(one_line(redacted(line)), err=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _speed(self) -> float:
        return (self._done - self._earlier) / max(time.monotonic() - self._start, 1e-9)


class PrintableSink:
    """A terminal to write UTF-8 text to, whole characters at a time: nothing in it steers the terminal."""

    def __init__(self, terminal: BinaryIO) -> None:
        self._terminal = terminal

    def write(self, data: bytes) -> int:
        self._terminal.write(printable(data.decode()).encode())
        return len(data)
