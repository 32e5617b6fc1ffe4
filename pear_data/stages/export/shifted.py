"""`shifted`: JSON lines whose weight at t is that of the token at t + 1, for Levanter's `prebuilt` and for Tinker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.schema import DOUBLES, INPUT_IDS
from pear_data.stages.export.check import weights_fault
from pear_data.stages.export.formats import Format
from pear_data.stages.export.jsonl import opener, table_lines
from pear_data.stages.export.rows import Rows
from pear_data.store.columns import list_column

FILLER = 0  # of weight 0, behind the sample: no token of it sees it


def shifted_format(max_length: int | None) -> Format:
    """A row a sample: input_ids, and loss_weights one place to the left; filled up to `max_length`, where there is one.

    Levanter takes rows of one length only, that of its sequences; Tinker takes any.
    """
    return Format(
        ".jsonl",
        "loss_weights[t] multiplies -log p(input_ids[t+1] | input_ids[<=t]): shifted, at the index of the token that "
        "predicts; the last is 0",
        "Levanter: sum(loss_weights * nll) / sum(loss_weights), in which the weights' absolute scale cancels; Tinker: "
        "sum(loss_weights * nll)",
        opener(lambda rows: table_lines(_table(rows, max_length))),
        "Levanter takes it as format {type: prebuilt, input_ids_key: input_ids, loss_weights_key: loss_weights}, with "
        "block_cross_document_attention: false and rows of one length (--max-length, its train_seq_len); "
        "Tinker takes Datums made of its rows: pear_data/hooks/levanter.md, tinker.md",
    )


def _table(rows: Rows, max_length: int | None) -> pa.Table:
    shifted = np.append(rows.loss_weights[1:], np.float32(0))
    shifted[rows.offsets[1:] - 1] = 0
    # As float64, or the decimals would be the shortest that tell float32s apart, which are other float64s.
    ids, weights, lengths = rows.input_ids, shifted.astype(np.float64), rows.lengths
    if max_length is not None:
        ids, weights = (_filled(values, rows, max_length) for values in (ids, weights))
        lengths = np.full(len(rows), max_length)
    columns = {
        "sample_id": rows.sample_id,
        "input_ids": list_column(ids, lengths, INPUT_IDS),
        "loss_weights": list_column(weights, lengths, DOUBLES),
    }
    return pa.table(columns)


def _filled(values: npt.NDArray[Any], rows: Rows, length: int) -> npt.NDArray[Any]:
    filled = np.full((len(rows), length), FILLER, dtype=values.dtype)
    filled[np.arange(length) < rows.lengths[:, None]] = values
    return filled.ravel()


def fault_of_length(max_length: int | None) -> Callable[[dict[str, Any]], str | None]:
    """What tells a line's fault, in an export filled up to `max_length`."""

    def fault(row: dict[str, Any]) -> str | None:
        if max_length is not None and (found := len(row["input_ids"])) != max_length:
            return f"sample {row['sample_id']!r}: {found} tokens, and rows are filled up to {max_length}"
        return shifted_fault(row)

    return fault


def shifted_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with one line, or None."""
    name, ids = f"sample {row['sample_id']!r}", np.asarray(row["input_ids"])
    weights = np.asarray(row["loss_weights"], dtype=np.float64)
    if ids.dtype.kind != "i" or (ids < 0).any():
        return f"{name}: an id is no token id"
    if fault := weights_fault(name, weights, len(ids)):
        return fault
    return (
        f"{name}: the last weight is {weights[-1]:g}, though it has no token to multiply"
        if weights[-1]
        else None
    )
