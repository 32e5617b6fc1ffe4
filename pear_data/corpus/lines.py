"""JSON Lines, plain or compressed, read with bounded memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pear_data.corpus.records import MAX_ROW_BYTES, QUARANTINED_BYTES, Rejected, Row, parse_object, rejected
from pear_data.errors import SampleError

_BUFFER = 1 << 20
_BOM = b"\xef\xbb\xbf"


def read_lines(path: Path, compression: str | None, skip: int) -> Iterator[Row | Rejected]:
    """The rows of a JSON Lines file after its first `skip` lines; `compression` is None, "gzip" or "zstd".

    Blank lines are passed over but counted as lines, and a byte order mark may open the file. A line longer than
    `MAX_ROW_BYTES` is rejected without being held.

    Raises:
        OSError: the file cannot be read, or its compressed data is damaged or cut short.
    """
    with _opened(path, compression) as stream:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            too_long = len(line) > MAX_ROW_BYTES and not line.endswith(b"\n")
            if too_long:
                size = len(line) + _drain(stream)
            if number <= skip:
                continue
            if too_long:
                reason = f"longer than {MAX_ROW_BYTES:,} bytes"
                yield rejected(number, reason, line[:QUARANTINED_BYTES], size)
                continue
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            content = line.removeprefix(_BOM) if number == 1 else line
            if not content.strip(b" \t\r\n"):
                continue
            try:
                yield Row(number, *parse_object(content), line)
            except SampleError as error:
                yield rejected(number, str(error), line)


@contextlib.contextmanager
def _opened(path: Path, compression: str | None) -> Iterator[io.BufferedReader]:
    # pyarrow's streams notice a frame that is cut short; zstandard's reader takes it for the end of the file.
    with contextlib.ExitStack() as stack:
        raw: pa.NativeFile = stack.enter_context(pa.OSFile(str(path), "rb"))
        if compression:
            raw = stack.enter_context(pa.CompressedInputStream(raw, compression))
        yield stack.enter_context(io.BufferedReader(raw, _BUFFER))


def _drain(stream: io.BufferedReader) -> int:
    """Read to the end of the line without holding it; how many bytes that was."""
    size = 0
    while part := stream.readline(_BUFFER):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size
