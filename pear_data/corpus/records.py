"""One row of an input, and what makes a line of JSON acceptable as one."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from pear_data.errors import SampleError

MAX_ROW_BYTES = 64 << 20  # a longer line, or a table row that decodes to more, is rejected unread
MAX_DEPTH = 100  # of nested lists and objects
QUARANTINED_BYTES = 64 << 10  # of a rejected row's raw bytes are kept

_BOM = "\N{BYTE ORDER MARK}"
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKETS = b"[]{}"
_NOT_BRACKETS = bytes(set(range(256)).difference(_BRACKETS))
_DEPTH_STEP = np.zeros(256, dtype=np.int8)
_DEPTH_STEP[list(b"[{")] = 1
_DEPTH_STEP[list(b"]}")] = -1
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_CUT = re.compile(r" \(raw row cut to [\d,]+ of [\d,]+ bytes\)\Z")
_KIND = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Row:
    """A row that could be read: `number` counts an input's lines or rows from 1.

    `fields` are its values as JSON has them; a table's columns of numbers come as 1-D numpy arrays. `text` is the
    row's own JSON where it had one, and `line` the bytes of the line it stood on.
    """

    number: int
    fields: dict[str, Any]
    text: str | None = None
    line: bytes | None = None

    def raw(self) -> bytes:
        """The row as the quarantine keeps it: its line as it is in the file; a table's row as JSON."""
        return self.as_json().encode() if self.line is None else self.line

    def as_json(self, without: Collection[str] = ()) -> str:
        """The row as JSON, less some fields. What JSON lacks is written as its nearest: non-finite numbers as
        null, dates and decimals as strings, bytes as hex."""
        if self.text is not None and not without:
            return self.text
        return to_json({key: value for key, value in self.fields.items() if key not in without})


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot become a sample, as the quarantine keeps it."""

    number: int
    reason: str
    raw: bytes


def rejected(number: int, reason: str, raw: bytes, size: int | None = None) -> Rejected:
    """A rejected row of `size` bytes (default: all of `raw`); says so where only the head of it is kept."""
    size = len(raw) if size is None else size
    reason = _CUT.sub("", reason)  # where this was rejected before
    if size > QUARANTINED_BYTES:
        reason = f"{reason} (raw row cut to {QUARANTINED_BYTES:,} of {size:,} bytes)"
    return Rejected(number, reason, raw[:QUARANTINED_BYTES])


def parse_object(line: bytes) -> tuple[dict[str, Any], str]:
    """A line of JSON Lines as its fields and its text, less the white space around it.

    Raises:
        SampleError: it is not UTF-8, not strict JSON (no NaN, no key twice, no lone surrogate), nested too deep, or
            no object.
    """
    try:
        text = line.decode().strip(" \t\r\n")
    except UnicodeDecodeError as error:
        raise SampleError(f"not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start}") from None
    value = parse_json(text)
    if not isinstance(value, dict):
        raise SampleError(f"not a JSON object but a {_KIND[type(value)]}")
    return value, text


def parse_json(text: str) -> Any:
    """Strict JSON.

    Raises:
        SampleError: with what is wrong, and where.
    """
    if text.startswith(_BOM):
        raise SampleError("a byte order mark in front of the JSON")
    if _depth(text) > MAX_DEPTH:
        raise SampleError(f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise SampleError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError:
        raise SampleError("not JSON: a number of thousands of digits") from None
    if _SURROGATE_ESCAPE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            unit = ord(error.object[error.start])
            raise SampleError(f"a lone surrogate \\u{unit:04x}: it is no character") from None
    return value


def to_json(value: Any) -> str:
    """JSON of values read from a table, see `Row.as_json`."""
    try:
        return _dumps(value)
    except ValueError:
        return _dumps(_without_nonfinite(value))


def shown(value: Any, limit: int = 60) -> str:
    """A value from a corpus as it may stand in a message: one line, no control characters, cut."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_nearest)


def _nearest(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.hex() if isinstance(value, bytes) else str(value)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _without_nonfinite(value.tolist())
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _depth(text: str) -> int:
    """Levels of nesting, or a bound on them that is small enough."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return MAX_DEPTH
    brackets = _STRING.sub(b"", text.encode()).translate(None, delete=_NOT_BRACKETS)
    steps = _DEPTH_STEP[np.frombuffer(brackets, dtype=np.uint8)]
    return int(np.cumsum(steps, dtype=np.int64).max(initial=0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise SampleError(f"the key {shown(twice)} appears twice")
    return fields


def _not_json(constant: str) -> NoReturn:
    raise SampleError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_not_json)
