"""`shifted`: JSON lines whose weight at t is that of the token at t + 1, for Levanter's `prebuilt` and for Tinker."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pear_data.schema import DOUBLES, INPUT_IDS
from pear_data.stages.export.check import weights_fault
from pear_data.stages.export.formats import Format
from pear_data.stages.export.jsonl import opener, table_lines
from pear_data.stages.export.rows import Rows
from pear_data.store.columns import list_column


def shifted_format() -> Format:
    """A row a sample: input_ids, and loss_weights one place to the left."""
    return Format(
        ".jsonl",
        "loss_weights[t] multiplies -log p(input_ids[t+1] | input_ids[<=t]): shifted, at the index of the token that "
        "predicts; the last is 0",
        "Levanter: sum(loss_weights * nll) / sum(loss_weights), in which the weights' absolute scale cancels; Tinker: "
        "sum(loss_weights * nll)",
        opener(lambda rows: table_lines(_table(rows))),
        "Levanter takes it as format {type: prebuilt, input_ids_key: input_ids, loss_weights_key: loss_weights}; "
        "Tinker takes Datums made of its rows: pear_data/hooks/levanter.md, tinker.md",
    )


def _table(rows: Rows) -> pa.Table:
    shifted = np.append(rows.loss_weights[1:], np.float32(0))
    shifted[rows.offsets[1:] - 1] = 0
    columns = {
        "sample_id": rows.sample_id,
        "input_ids": list_column(rows.input_ids, rows.lengths, INPUT_IDS),
        # As float64, or the decimals would be the shortest that tell float32s apart, which are other float64s.
        "loss_weights": list_column(shifted.astype(np.float64), rows.lengths, DOUBLES),
    }
    return pa.table(columns)


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
