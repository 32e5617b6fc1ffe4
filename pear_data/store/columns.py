"""List columns to flat numpy arrays and back, without a copy where Arrow allows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pear_data.store.reading import reading

IntArray = npt.NDArray[np.int64]


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of a whole Parquet file. (`pyarrow.parquet.read_table` loads another 50 MB of code.)"""
    with reading(path), pq.ParquetFile(path, pre_buffer=False) as parquet:
        return parquet.read(columns=list(columns), use_threads=False)


def flat_values(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[Any]:
    """The elements of a list column back to back; null lists contribute none."""
    return np.asarray(_one_chunk(column).flatten().to_numpy(zero_copy_only=False))


def list_lengths(column: pa.ChunkedArray | pa.Array) -> IntArray:
    """Elements of each list, [n]; 0 for a null list."""
    lengths = _one_chunk(column).value_lengths().fill_null(0)
    return np.asarray(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)


def offsets_of(lengths: IntArray) -> IntArray:
    """Offsets [n + 1] of lists with these lengths [n]."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def list_column(
    values: npt.NDArray[Any], lengths: IntArray, kind: pa.ListType, valid: npt.NDArray[np.bool_] | None = None
) -> pa.ListArray:
    """A list column from flat values; rows where `valid` is false are null and must have length 0."""
    offsets = pa.array(offsets_of(lengths), type=pa.int32())
    mask = None if valid is None or valid.all() else pa.array(~valid)
    return pa.ListArray.from_arrays(offsets, pa.array(values, type=kind.value_type), type=kind, mask=mask)


def _one_chunk(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
