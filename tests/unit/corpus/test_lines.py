from __future__ import annotations

import gzip
import subprocess
import sys

import pytest
import zstandard

from pear_data.corpus import lines
from pear_data.corpus.lines import read_lines
from pear_data.corpus.records import Rejected

ROWS = b"".join(b'{"row": %d, "text": "%s"}\n' % (row, b"ab" * row) for row in range(1, 201))
PACK = {
    None: bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("compression", PACK)
def test_rows_come_with_their_line_numbers(tmp_path, compression):
    path = tmp_path / "rows"
    # Two members, as `cat a.gz b.gz` makes them, cut within a line.
    path.write_bytes(PACK[compression](ROWS[:777]) + PACK[compression](ROWS[777:]))
    rows = list(read_lines(path, compression, 0))
    assert [row.number for row in rows] == list(range(1, 201))
    assert all(row.fields["row"] == row.number for row in rows)
    assert list(read_lines(path, compression, 150)) == rows[150:]
    assert list(read_lines(path, compression, 200)) == list(read_lines(path, compression, 999)) == []


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["cut short", "cut by a byte", "flipped", "followed by something else"])
def test_damaged_compression_is_an_error(tmp_path, compression, damage):
    packed = bytearray(PACK[compression](ROWS))
    if damage == "flipped":
        packed[len(packed) // 2] ^= 0x10
    elif damage == "followed by something else":
        packed += b"more of it"
    else:
        del packed[-1 if damage == "cut by a byte" else len(packed) // 2 :]
    path = tmp_path / "rows"
    path.write_bytes(packed)
    with pytest.raises(OSError, match=r"."):
        list(read_lines(path, compression, 0))


def test_blank_lines_carry_no_row_and_count_as_lines(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b'\n{"a": 1}\n \t\r\n\n{"a": 2}\r\n{"a": 3}')
    assert [(row.number, row.fields["a"]) for row in read_lines(path, None, 0)] == [(2, 1), (5, 2), (6, 3)]


def test_a_byte_order_mark_may_open_the_file_only(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    first, second = read_lines(path, None, 0)
    assert (first.fields, first.text) == ({"a": 1}, '{"a": 1}')
    assert second == Rejected(2, "a byte order mark in front of the JSON", b'\xef\xbb\xbf{"a": 2}')


def test_a_bad_line_does_not_end_the_file(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b'{"a": 1}\nnot json\r\n{"a": 3}\n')
    first, bad, last = read_lines(path, None, 0)
    assert (first.number, last.number) == (1, 3)
    assert bad == Rejected(2, "not JSON: Expecting value at character 1", b"not json")


@pytest.mark.parametrize("extra", [0, 1, 2, 5000])
def test_lines_up_to_the_cap_are_read(tmp_path, monkeypatch, extra):
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(lines, "QUARANTINED_BYTES", 10)
    line = b'{"a": "' + b"x" * (1000 - 9 + extra) + b'"}'
    path = tmp_path / "rows"
    path.write_bytes(line + b"\n" + b'{"a": 2}\n')
    first, second = read_lines(path, None, 0)
    assert second.fields == {"a": 2}
    assert isinstance(first, Rejected) == (extra > 0)
    if extra:
        assert first.raw == line[:10]
        assert first.reason.startswith("longer than 1,000 bytes")


def test_a_bomb_is_rejected_in_bounded_memory(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"prompt": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"prompt": "fine"}\n')
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from pear_data.corpus.lines import read_lines\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "bomb, fine = read_lines(Path(sys.argv[1]), 'gzip', 0)\n"
        "print(bomb.reason, len(bomb.raw), fine.fields)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    outcome, kilobytes = done.stdout.splitlines()
    assert outcome == (
        "longer than 67,108,864 bytes (raw row cut to 65,536 of 200,000,015 bytes) 65536 {'prompt': 'fine'}"
    )
    assert int(kilobytes) < 190 << 10, "more than three times the longest line allowed"
