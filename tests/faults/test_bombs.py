"""Files of some kilobytes that decode to gigabytes end in one line and bounded memory, whatever they claim."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ZEROS = 700_000_000

# In a child, whose bound and peak are its own; half the real bound keeps the test small.
READ = """
import resource, sys
from pathlib import Path
from pear_data.corpus import bounded_memory, examples
from pear_data.corpus.inputs import Input
from pear_data.errors import PearError
bounded_memory.DECODING_BYTES = 3 << 29
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
limits = resource.getrlimit(resource.RLIMIT_AS)
try:
    for row in examples.rows_of(Input(Path(sys.argv[1]), "bomb", "bomb", sys.argv[2]), 0):
        assert row.number < 10, "it decoded"
except PearError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert resource.getrlimit(resource.RLIMIT_AS) == limits
"""


def zeros():
    """Many zeros, none of which takes memory."""
    return pa.py_buffer(np.zeros(ZEROS, np.int8))


def arrow_bomb(path):
    write_stream(path, pa.Array.from_buffers(pa.int8(), ZEROS, [None, zeros()]))
    return "arrow"


def dictionary_bomb(path):
    """Dictionaries of Arrow files are read before any row."""
    offsets = pa.py_buffer(np.array([0, ZEROS], np.int32))
    text = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, zeros()])
    write_stream(path, pa.DictionaryArray.from_arrays(pa.array([0]), text))
    return "arrow"


def write_stream(path, column):
    table = pa.table(dict.fromkeys("abc", column))
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def list_bomb(path):
    """Parquet's levels: one row of very many nulls among a thousand empty ones, in some bytes."""
    offsets = pa.array(np.concatenate([[0], np.full(1000, 300_000_000)]), pa.int32())
    column = pa.ListArray.from_arrays(offsets, pa.nulls(300_000_000))
    pq.write_table(pa.table({"a": column}), path, store_schema=False)
    return "parquet"


@pytest.mark.parametrize("make", [arrow_bomb, dictionary_bomb, list_bomb])
def test_a_bomb_is_refused_in_bounded_memory(tmp_path, make):
    path = tmp_path / "bomb"
    kind = make(path)
    assert path.stat().st_size < 400_000
    done = subprocess.run([sys.executable, "-c", READ, str(path), kind], capture_output=True, text=True)
    message, kilobytes = done.stdout.splitlines()
    assert message == (
        "bomb decodes to more than 1.5 GiB in one piece: write it again with smaller batches, row groups and pages"
    ), done.stderr
    assert int(kilobytes) < 3 << 19
