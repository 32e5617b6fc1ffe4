from __future__ import annotations

import datetime
import decimal
import json

import numpy as np
import pytest

from pear_data.corpus.records import (
    MAX_DEPTH,
    QUARANTINED_BYTES,
    Row,
    parse_object,
    rejected,
    shown,
)
from pear_data.errors import SampleError

NASTIES = {
    b'{"a": "\xff"}': "not UTF-8: byte 0xff at offset 7",
    b'{"a": "\xed\xa0\x80"}': "not UTF-8: byte 0xed at offset 7",
    b'{"a": "\\ud800"}': "a lone surrogate \\ud800: it is no character",
    b'{"\\udc00": 1}': "a lone surrogate \\udc00: it is no character",
    b'{"a": NaN}': "NaN is not JSON",
    b'{"a": [1, -Infinity]}': "-Infinity is not JSON",
    b'{"a": 1, "b": {"c": 1, "c": 2}}': "the key 'c' appears twice",
    b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}": f"nested deeper than {MAX_DEPTH} levels",
    b"[" * 1_000_000: f"nested deeper than {MAX_DEPTH} levels",
    b"\xef\xbb\xbf{}": "a byte order mark in front of the JSON",
    b"[1, 2]": "not a JSON object but a list",
    b'"text"': "not a JSON object but a string",
    b"3": "not a JSON object but a number",
    b"true": "not a JSON object but a boolean",
    b"null": "not a JSON object but a null",
    b'{"a": 1} {"b": 2}': "not JSON: Extra data at character 10",
    b'{"a": 1': "not JSON: Expecting ',' delimiter at character 8",
    b"{'a': 1}": "not JSON: Expecting property name enclosed in double quotes at character 2",
    b'{"a": "\t"}': "not JSON: Invalid control character at at character 8",
    b'{"a": ' + b"9" * 5000 + b"}": "not JSON: a number of thousands of digits",
    b"\x00": "not JSON: Expecting value at character 1",
}


@pytest.mark.parametrize(("line", "reason"), NASTIES.items(), ids=range(len(NASTIES)))
def test_what_is_not_strict_json_is_refused_with_the_reason(line, reason):
    with pytest.raises(SampleError) as caught:
        parse_object(line)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    "line",
    [
        b'{"a": 1}\r\n',
        b'  {"a": 1}\t\n',
        '{"a": "\\ud83d\\ude00 \U0001f600"}'.encode(),  # a surrogate pair is a character
        '{"a": "\u2028\ufeff\x7f"}'.encode(),
        b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}",
        b'{"a": "' + b"[{" * 1000 + b'\\"[[[["}',  # brackets of a string are no nesting
        b'{"a": [' + b"{}, " * 500 + b"[]]}",
        b'{"a": 1e400}',
    ],
    ids=range(8),
)
def test_what_is_json_is_taken_as_it_is(line):
    fields, text = parse_object(line)
    assert fields == json.loads(line)
    assert text == line.decode().strip()


def test_a_cut_raw_row_says_so():
    row = rejected(3, "bad", b"x" * (QUARANTINED_BYTES + 5))
    assert row.raw == b"x" * QUARANTINED_BYTES
    assert row.reason == "bad (raw row cut to 65,536 of 65,541 bytes)"
    assert rejected(4, row.reason, b"x" * (QUARANTINED_BYTES + 5)).reason == row.reason
    assert rejected(3, "bad", b"short").reason == "bad"


def test_a_table_row_becomes_json():
    fields = {
        "text": "\u4e2d\u2028",
        "ids": np.array([1, 2], np.int32),
        "logprobs": np.array([-0.5, -np.inf], np.float32),
        "score": float("nan"),
        "day": datetime.date(2026, 1, 2),
        "price": decimal.Decimal("1.50"),
        "blob": b"\x00\xff",
        "nested": [{"a": (1, float("inf"))}],
    }
    assert json.loads(Row(1, fields).as_json(without=("ids",))) == {
        "text": "\u4e2d\u2028",
        "logprobs": [-0.5, None],
        "score": None,
        "day": "2026-01-02",
        "price": "1.50",
        "blob": "00ff",
        "nested": [{"a": [1, None]}],
    }


def test_a_line_keeps_its_own_text():
    fields, text = parse_object(b' {"x": 0.10, "y": "\\u00e9"} \n')
    assert Row(1, fields, text).as_json() == '{"x": 0.10, "y": "\\u00e9"}'
    assert Row(1, fields, text).as_json(without=("x",)) == '{"y": "é"}'


def test_values_are_shown_on_one_safe_line():
    assert shown("a\n\x1b[2J") == "'a\\n\\x1b[2J'"
    assert len(shown("x" * 1000)) == 60
