"""Bad input, case by case, with what `pear-data ingest` makes of it.

    python tests/faults/bad_input.py

prints each case with its exit code and what the user reads: the error, or the reason in quarantine.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pear_data.cli.entry import run
from pear_data.demo import asset
from pear_data.stages.quarantine import write_quarantine
from pear_data.store import open_store

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
GOOD_LINE = json.dumps(GOOD).encode()
PAIR = {"prompt": ["q", "q"], "completion": ["a", "a"]}


@dataclass(frozen=True)
class Case:
    """`make(folder)` writes the input and returns ingest's arguments; `message` is part of what the user reads."""

    name: str
    make: Callable[[Path], list[str]]
    code: int
    message: str


def written(content: bytes, name: str = "a.jsonl") -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return [str(folder / name)]

    return make


def beside(line: bytes) -> Callable[[Path], list[str]]:
    """A good line and another."""
    return written(GOOD_LINE + b"\n" + line + b"\n")


def tokens(**fields: object) -> Callable[[Path], list[str]]:
    good = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}
    lines = [good, {**good, **fields}]
    return written("\n".join(map(json.dumps, lines)).encode())


def table(columns: dict[str, object] | pa.Table, name: str = "a.parquet") -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), folder / name)
        return [str(folder / name)]

    return make


def both(*makes: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    return lambda folder: [argument for make in makes for argument in make(folder)]


def with_options(make: Callable[[Path], list[str]], *options: str) -> Callable[[Path], list[str]]:
    return lambda folder: [*make(folder), *options]


def stream(columns: dict[str, object]) -> bytes:
    sink = pa.BufferOutputStream()
    content = pa.table(columns)
    with pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)
    return sink.getvalue().to_pybytes()


def not_utf8() -> pa.Table:
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"q", b"\xff"]).buffers())
    return pa.table({"prompt": column, "completion": ["a", "a"]})


def dangling(folder: Path) -> list[str]:
    (folder / "a.jsonl").symlink_to(folder / "gone")
    return [str(folder / "a.jsonl")]


def a_folder_named_like_a_file(folder: Path) -> list[str]:
    (folder / "a.jsonl").mkdir()
    return [str(folder / "a.jsonl")]


def twice(folder: Path) -> list[str]:
    return written(GOOD_LINE)(folder) * 2


def linked_twice(folder: Path) -> list[str]:
    (path,) = written(GOOD_LINE)(folder)
    (folder / "b.jsonl").symlink_to(path)
    return [path, str(folder / "b.jsonl")]


def with_ids(*ids: object, content: str = "a") -> Callable[[Path], list[str]]:
    rows = [{"id": each, **GOOD} for each in ids]
    rows[-1] = {**rows[-1], "messages": [GOOD["messages"][0], {"role": "assistant", "content": content}]}
    return written("\n".join(map(json.dumps, rows)).encode())


TURN = b'{"messages": [{"role": "user", "content": "q"}, %b]}'
DEEP = b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"

CASES = [
    # Lines that are no JSON object
    Case("not UTF-8", beside(b'{"messages": "\xff"}'), 3, "not UTF-8: byte 0xff at offset 14"),
    Case("UTF-16", beside('{"a": 1}'.encode("utf-16")), 3, "not UTF-8: byte 0xff at offset 0"),
    Case("a surrogate in UTF-8", beside(b'{"a": "\xed\xa0\x80"}'), 3, "not UTF-8: byte 0xed at offset 7"),
    Case("a lone surrogate escaped", beside(b'{"messages": "\\ud800"}'), 3, "a lone surrogate \\ud800"),
    Case("NaN", beside(b'{"messages": NaN}'), 3, "NaN is not JSON"),
    Case("Infinity", beside(b'{"messages": -Infinity}'), 3, "-Infinity is not JSON"),
    Case("a key twice", beside(b'{"messages": 1, "messages": 2}'), 3, "the key 'messages' appears twice"),
    Case("nested 5,000 deep", beside(DEEP), 3, "nested deeper than 100 levels"),
    Case(
        "an integer of 5,000 digits",
        beside(b'{"a": ' + b"9" * 5000 + b"}"),
        3,
        "a number of thousands of digits",
    ),
    Case("cut short", beside(GOOD_LINE[:-1]), 3, "not JSON: Expecting ',' delimiter"),
    Case("trailing garbage", beside(GOOD_LINE + b" x"), 3, "not JSON: Extra data at character"),
    Case("two objects on a line", beside(GOOD_LINE + GOOD_LINE), 3, "not JSON: Extra data at character"),
    Case("single quotes", beside(b"{'a': 1}"), 3, "property name enclosed in double quotes"),
    Case("a comment", beside(b"// comment"), 3, "not JSON: Expecting value at character 1"),
    Case("HTML", beside(b"<html>"), 3, "not JSON: Expecting value at character 1"),
    Case("NUL bytes", beside(b"\0\0\0"), 3, "not JSON: Expecting value at character 1"),
    Case("a control character in a string", beside(b'{"a": "\x01"}'), 3, "Invalid control character at"),
    Case("an array", beside(b"[1]"), 3, "not a JSON object but a list"),
    Case("null", beside(b"null"), 3, "not a JSON object but a null"),
    Case(
        "a mark in mid-file", beside(b"\xef\xbb\xbf" + GOOD_LINE), 3, "a byte order mark in front of the JSON"
    ),
    Case(
        "a line of 65 MiB",
        beside(b"x" * (65 << 20)),
        3,
        "longer than 67,108,864 bytes (raw row cut to 65,536",
    ),
    # Rows that are no sample
    Case(
        "another layout",
        beside(b'{"prompt": "q", "completion": "a"}'),
        3,
        "field 'messages' is missing or null",
    ),
    Case("null messages", beside(b'{"messages": null}'), 3, "field 'messages' is missing or null"),
    Case("empty messages", beside(b'{"messages": []}'), 3, "'messages' holds no turns"),
    Case("messages as text", beside(b'{"messages": "q"}'), 3, "messages: not JSON"),
    Case("a turn that is text", beside(TURN % b'"a"'), 3, "turn 2 is not an object"),
    Case(
        "an unknown role",
        beside(TURN % b'{"role": "who", "content": "a"}'),
        3,
        "turn 2 has the unknown role 'who'",
    ),
    Case(
        "a role that is a list",
        beside(TURN % b'{"role": [], "content": "a"}'),
        3,
        "turn 2 has the unknown role []",
    ),
    Case(
        "content that is null",
        beside(TURN % b'{"role": "assistant", "content": null}'),
        3,
        "turn 2 has no 'content'",
    ),
    Case(
        "content that is a number",
        beside(TURN % b'{"role": "assistant", "content": 1}'),
        3,
        "neither a string nor",
    ),
    Case(
        "nothing to score",
        beside(b'{"messages": [{"role": "user", "content": "q"}]}'),
        3,
        "no assistant turn",
    ),
    Case(
        "a broken tool call",
        beside(TURN % b'{"role": "assistant", "tool_calls": [1]}'),
        3,
        "has no function name",
    ),
    Case("a number beyond floats", beside(b'{"x": 1e999, "messages": []}'), 3, "'messages' holds no turns"),
    Case(
        "an empty response",
        with_options(table({**PAIR, "completion": ["a", None]})),
        3,
        "field 'completion' is missing",
    ),
    Case(
        "ids below 0", tokens(input_ids=[1, -2, 3]), 3, "token id -2 at position 1 is none of the tokenizer's"
    ),
    Case(
        "ids beyond the vocabulary",
        tokens(input_ids=[1, 10**6, 3]),
        3,
        "token id 1000000 at position 1 is none",
    ),
    Case(
        "ids beyond 64 bits", tokens(input_ids=[1, 2**70, 3]), 3, "holds numbers that are no 64-bit integers"
    ),
    Case("ids as floats", tokens(input_ids=[1, 2.0, 3]), 3, "field 'input_ids' is not a list of integers"),
    Case("ids as text", tokens(input_ids=["1", "2", "3"]), 3, "field 'input_ids' is not a list of integers"),
    Case("ids as one text", tokens(input_ids="1 2 3"), 3, "field 'input_ids' is not a list of integers"),
    Case(
        "ids as booleans",
        tokens(input_ids=[True, True, True]),
        3,
        "field 'input_ids' is not a list of integers",
    ),
    Case("ids in lists", tokens(input_ids=[[1, 2, 3]]), 3, "field 'input_ids' is not a list of integers"),
    Case("no ids", tokens(input_ids=[], loss_mask=[]), 3, "no scored tokens"),
    Case("a mask too short", tokens(loss_mask=[0, 1]), 3, "loss_mask has 2 elements for 3 input_ids"),
    Case("a mask of 2s", tokens(loss_mask=[0, 2, 1]), 3, "holds something else than 0, 1, true and false"),
    Case("a mask of zeros", tokens(loss_mask=[0, 0, 0]), 3, "no scored tokens"),
    Case(
        "a padded row", tokens(attention_mask=[1, 1, 0]), 3, "attention_mask has zeros: take the padding out"
    ),
    Case(
        "shifted labels",
        written(b'{"input_ids": [1, 2], "labels": [-100, 2]}\n{"input_ids": [1, 2], "labels": [2, -100]}'),
        3,
        "labels and input_ids differ at position 0",
    ),
    Case(
        "a label of 0",
        with_options(
            written(
                b'{"prompt": "q", "completion": "a", "label": 1}\n'
                b'{"prompt": "q", "completion": "a", "label": 0}'
            ),
            "--label-field",
            "label",
        ),
        3,
        "a label is 1 or -1",
    ),
    Case("text that is not UTF-8 in a table", table(not_utf8()), 3, "holds text that is not UTF-8"),
    # Ids
    Case(
        "an id twice, alike",
        with_ids("x", "x"),
        1,
        "the sample id 'x' occurs twice, at a.jsonl:1 and at a.jsonl:2",
    ),
    Case("an id twice, differing", with_ids("x", "x", content="b"), 1, "the sample id 'x' occurs twice"),
    Case("an id as number and text", with_ids(1, "1"), 1, "the sample id '1' occurs twice"),
    Case(
        "an id twice, in two files", both(with_ids("x"), table({**PAIR, "id": ["x", "y"]})), 1, "occurs twice"
    ),
    Case("an id that is empty", with_ids("x", ""), 3, "field 'id' is empty: it holds the sample id"),
    Case("an id that is a list", with_ids("x", [1]), 3, "field 'id' is neither a string nor an integer"),
    Case(
        "ids like paths and controls",
        with_ids("../../x", "/etc/x", "a\0b", "\x1b[2J", "x" * 65536),
        0,
        "5 samples",
    ),
    Case(
        "a named id field that no row has",
        with_options(beside(GOOD_LINE), "--id-field", "no"),
        2,
        "no row has the fields no",
    ),
    # Files
    Case("an empty file", written(b""), 1, "the corpus has no rows (read: a.jsonl)"),
    Case("blank lines only", written(b"\n \r\n\n"), 1, "the corpus has no rows (read: a.jsonl)"),
    Case("a byte order mark only", written(b"\xef\xbb\xbf"), 1, "the corpus has no rows (read: a.jsonl)"),
    Case(
        "a mark, CRLF and no last newline",
        written(b"\xef\xbb\xbf" + GOOD_LINE + b"\r\n" + GOOD_LINE),
        0,
        "2 samples",
    ),
    Case("no usable row", written(b"bad\n[]\n"), 1, "the corpus has no usable row (a.jsonl:1: not JSON"),
    Case("no layout", written(b'{"text": "plain"}'), 2, "no row fits a layout; fields of row 1: 'text'"),
    Case(
        "one JSON document", written(json.dumps([GOOD], indent=1).encode()), 1, "the corpus has no usable row"
    ),
    Case("CSV", written(b"prompt,completion\nq,a\n", "a.csv"), 1, "the corpus has no usable row"),
    Case("gzip under another name", written(gzip.compress(GOOD_LINE)), 0, "1 samples"),
    Case("lines named .gz", written(GOOD_LINE, "a.jsonl.gz"), 0, "1 samples"),
    Case(
        "gzip cut short",
        written(gzip.compress(GOOD_LINE * 99)[:-9], "a.gz"),
        1,
        "a.gz is damaged or unreadable",
    ),
    Case(
        "zstd cut short",
        written(zstandard.compress(GOOD_LINE * 99)[:-9], "a.zst"),
        1,
        "a.zst is damaged or unreadable",
    ),
    Case(
        "garbage behind gzip",
        written(gzip.compress(GOOD_LINE) + b"x" * 40, "a.gz"),
        1,
        "a.gz is damaged or unreadable",
    ),
    Case("zip", written(b"PK\3\4" + bytes(range(200)), "a.zip"), 1, "the corpus has no usable row"),
    Case(
        "a Parquet file cut short",
        written(b"PAR1" + bytes(100), "a.parquet"),
        1,
        "a.parquet is damaged or unreadable",
    ),
    Case(
        "a Parquet file without rows",
        table({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}),
        1,
        "the corpus has no rows",
    ),
    Case("a Parquet file without columns", table(pa.table({})), 1, "the corpus has no rows"),
    Case(
        "columns of other types", table({"prompt": [1, 2], "completion": [3, 4]}), 2, "no row fits a layout"
    ),
    Case(
        "two columns of one name",
        table(pa.table([["q"], ["q"]], names=["prompt", "prompt"])),
        1,
        "two columns named 'prompt'",
    ),
    Case(
        "files of mixed schemas: a column gone",
        both(table(PAIR), table({"prompt": ["q"]}, "b.parquet")),
        2,
        "b.parquet: no row fits a layout",
    ),
    Case(
        "files of mixed schemas: another type",
        both(table(PAIR), table({**PAIR, "completion": [1.5, 2.5]}, "b.parquet")),
        2,
        "b.parquet: no row fits a layout",
    ),
    Case(
        "files of mixed schemas: all null",
        both(table(PAIR), table({**PAIR, "completion": pa.nulls(2)}, "b.parquet")),
        2,
        "b.parquet: no row fits a layout",
    ),
    Case(
        "an Arrow stream cut short",
        written(stream(PAIR)[:-60], "a.arrow"),
        1,
        "a.arrow is damaged or unreadable",
    ),
    Case(
        "an Arrow file of garbage",
        written(b"ARROW1\0\0" + bytes(range(200)), "a.arrow"),
        1,
        "a.arrow is damaged or unreadable",
    ),
    Case("a folder without data", lambda folder: [str(folder)], 2, "holds no .jsonl"),
    Case("a folder named like a file", a_folder_named_like_a_file, 2, "holds no .jsonl"),
    Case("a file that is not there", lambda folder: [str(folder / "gone.jsonl")], 2, "no such file: "),
    Case("a dangling link", dangling, 2, "no such file: "),
    Case("a file given twice", twice, 2, "is given twice"),
    Case("a file and a link to it", linked_twice, 2, "is given twice"),
    Case("standard input twice", lambda folder: ["-", "-"], 2, "is given twice"),
    Case("a device", lambda folder: ["/dev/null"], 1, "the corpus has no rows (read: null)"),
    Case(
        "too many bad rows",
        with_options(written(GOOD_LINE + b"\nx\ny\nz\n"), "--max-bad", "1"),
        1,
        "2 rows rejected, more than --max-bad 1 allows; the last is a.jsonl:3: ",
    ),
    Case(
        "as many bad rows as allowed",
        with_options(written(GOOD_LINE + b"\nx\n"), "--max-bad", "1"),
        3,
        "not JSON",
    ),
]


def outcome(case: Case, folder: Path) -> tuple[int, str]:
    """Exit code and what the user reads: the error, the first reason in quarantine, or the summary."""
    inputs, store = folder / "inputs", folder / "store"
    inputs.mkdir()
    told = io.StringIO()
    with contextlib.redirect_stderr(told), empty_stdin():
        code = run(
            ["ingest", *case.make(inputs), "--tokenizer", str(asset("initial")), "--store", str(store)]
        )
    if code == 3:
        sink = io.BytesIO()
        write_quarantine(open_store(store), "jsonl", sink)
        return code, str(json.loads(sink.getvalue().splitlines()[0])["reason"])
    return code, told.getvalue().splitlines()[-1].replace(str(inputs), "...")


@contextlib.contextmanager
def empty_stdin() -> Iterator[None]:
    before = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def main() -> None:
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            code, message = outcome(case, Path(folder))
        as_told = "as told" if (code, case.message in message) == (case.code, True) else "OTHERWISE"
        print(f"{case.name}\t{code}\t{as_told}\t{message}", flush=True)


if __name__ == "__main__":
    main()
