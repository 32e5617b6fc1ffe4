"""The files of an export: rows gathered into groups, files closed when they are big enough and read again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from pear_data.errors import PearError
from pear_data.stages.export.formats import Format, Write
from pear_data.stages.export.manifest import ExportedFile, Split
from pear_data.stages.export.rows import Rows, joined
from pear_data.store.commit import sha256_of


class SplitFiles:
    """Files `<split>-NNNNN` of each split, each of about `shard_tokens` tokens: the sample that fills one is its last.

    Loaders take a file called train-* or validation-* for the split of that name and leave pear_export.json alone.
    """

    def __init__(
        self, folder: Path, form: Format, fault: Callable[[Path], str | None], shard_tokens: int
    ) -> None:
        self.written: list[ExportedFile] = []
        self._folder, self._form, self._fault, self._shard_tokens = folder, form, fault, shard_tokens
        self._open: dict[Split, _OpenFile] = {}

    def __enter__(self) -> SplitFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in list(self._open):
            if error is None:
                self._close(split)
            else:
                self._open.pop(split).stack.__exit__(kind, error, trace)

    def write(self, split: Split, rows: Rows) -> None:
        """Add samples to a split."""
        start = 0
        while start < len(rows):
            if split not in self._open:
                self._open[split] = self._next(split)
            file = self._open[split]
            ends = rows.offsets[1:] - rows.offsets[start]
            stop = min(int(np.searchsorted(ends, self._shard_tokens - file.tokens)) + 1, len(rows))
            file.add(rows.part(start, stop))
            if file.tokens >= self._shard_tokens:
                self._close(split)
            start = stop

    def _next(self, split: Split) -> _OpenFile:
        number = sum(file.split == split for file in self.written)
        return _OpenFile(self._folder / f"{split}-{number:05d}{self._form.suffix}", self._form)

    def _close(self, split: Split) -> None:
        file = self._open.pop(split)
        with file.stack:
            file.flush()
        if fault := self._fault(file.path):
            raise PearError(f"{file.path.name} was written, but {fault}: please report this")
        self.written.append(
            ExportedFile(name=file.path.name, split=split, rows=file.rows, sha256=sha256_of(file.path))
        )


class _OpenFile:
    """Gathers samples into groups of the format's size: a split of few samples would else have tiny row groups."""

    def __init__(self, path: Path, form: Format) -> None:
        self.path, self.rows, self.tokens = path, 0, 0
        self._gathered: list[Rows] = []
        self._gathered_tokens, self._group_tokens = 0, form.group_tokens
        self.stack = ExitStack()
        self._write: Write = self.stack.enter_context(form.open(path))

    def add(self, rows: Rows) -> None:
        self._gathered.append(rows)
        self.tokens += len(rows.input_ids)
        self._gathered_tokens += len(rows.input_ids)
        if self._gathered_tokens >= self._group_tokens:
            self.flush()

    def flush(self) -> None:
        if self._gathered:
            self.rows += self._write(joined(self._gathered))
        self._gathered, self._gathered_tokens = [], 0
