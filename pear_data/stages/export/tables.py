"""Parquet layouts: `hf`, `hf-packed` and `verl`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pear_data.errors import PearError
from pear_data.schema import BEHAVIOR_LOGPROBS, EXPORT_HF, EXPORT_PACKED, EXPORT_VERL, FLOATS, INPUT_IDS
from pear_data.stages.export.check import IGNORED_LABEL
from pear_data.stages.export.formats import GROUP_TOKENS, PER_LABEL, UNSHIFTED, Form, Format, Write
from pear_data.stages.export.packing import packed
from pear_data.stages.export.rows import Rows
from pear_data.store.columns import list_column, offsets_of
from pear_data.store.shards import parquet_shard

TableOf = Callable[[Rows], pa.Table]

SCHEMAS: dict[Form, pa.Schema] = {"hf": EXPORT_HF, "hf-packed": EXPORT_PACKED, "verl": EXPORT_VERL}
# Samples are packed with those near them: at least so many packs' worth, so that few packs have room left.
_PACKS_AT_ONCE = 64


def with_live(schema: pa.Schema, live: bool) -> pa.Schema:
    """The schema with the column that --live adds."""
    return schema.append(BEHAVIOR_LOGPROBS) if live else schema


def hf_format(live: bool) -> Format:
    """Canonical: a row a sample, for transformers, TRL, Axolotl and loops of one's own."""
    schema = with_live(EXPORT_HF, live)
    return Format(
        ".parquet",
        UNSHIFTED,
        PER_LABEL,
        _opener(schema, lambda rows: _hf_table(rows, schema)),
        "transformers, TRL, Axolotl or a loop of your own take it, each with the hook of its page: "
        "pear_data/hooks/transformers.md, trl.md, axolotl.md, pytorch.md",
    )


def packed_format(max_length: int, live: bool) -> Format:
    """A row a pack of samples, laid end to end."""
    schema = with_live(EXPORT_PACKED, live)
    return Format(
        ".parquet",
        f"{UNSHIFTED}; and so is the first index of every sample in a pack",
        PER_LABEL,
        _opener(schema, lambda rows: _packed_table(rows, schema, max_length)),
        "transformers and TRL (packing=False) take it, with padding_free=True: pear_data/hooks/transformers.md, "
        "pear_data/hooks/trl.md",
        group_tokens=max(GROUP_TOKENS, _PACKS_AT_ONCE * max_length),
    )


def verl_format() -> Format:
    """What `pear_data.hooks.verl.PearVerlDataset` reads."""
    return Format(
        ".parquet",
        UNSHIFTED,
        "sum(loss_weights * nll) / sum(loss_weights): the weights' absolute scale cancels",
        _opener(EXPORT_VERL, _verl_table),
        "verl takes it, with data.custom_cls.path=pkg://pear_data.hooks.verl data.custom_cls.name=PearVerlDataset: "
        "pear_data/hooks/verl.md",
        admitted=_without_negatives,
    )


def _without_negatives(rows: Rows) -> tuple[Rows, Counter[str]]:
    """All of them; raises PearError where a weight is negative, for which verl's denominator is not made."""
    if (bad := np.flatnonzero(rows.loss_weights < 0)).size:
        raise PearError(
            f"{rows.name_at(int(bad[0]))} has a weight of {rows.loss_weights[bad[0]]:g}, and verl divides by the sum "
            'of weights, from which negative ones would take: add --where "label = 1", or use format hf'
        )
    return rows, Counter()


def _opener(
    schema: pa.Schema, table_of: TableOf
) -> Callable[[Path], contextlib.AbstractContextManager[Write]]:
    @contextlib.contextmanager
    def opened(path: Path) -> Iterator[Write]:
        with parquet_shard(path, schema) as writer:

            def write(rows: Rows) -> int:
                table = table_of(rows)
                writer.write(table)
                return len(table)

            yield write

    return opened


def _hf_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    columns = {
        **_token_columns(rows, rows.lengths),
        "attention_mask": list_column(
            np.ones(len(rows.input_ids), dtype=np.int8), rows.lengths, schema.field("attention_mask").type
        ),
        "sample_id": rows.sample_id,
        "source": rows.source,
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _verl_table(rows: Rows) -> pa.Table:
    columns = {**_token_columns(rows, rows.lengths), "sample_id": rows.sample_id, "source": rows.source}
    return pa.table([columns[name] for name in EXPORT_VERL.names], schema=EXPORT_VERL)


def _packed_table(rows: Rows, schema: pa.Schema, max_length: int) -> pa.Table:
    packs = packed(rows, max_length)
    laid = packs.rows
    of_pack = offsets_of(packs.samples)
    lengths = np.add.reduceat(laid.lengths, of_pack[:-1])
    positions = np.arange(len(laid.input_ids)) - np.repeat(laid.offsets[:-1], laid.lengths)
    columns = {
        **_token_columns(laid, lengths),
        "position_ids": list_column(positions.astype(np.int32), lengths, INPUT_IDS),
        "seq_lengths": list_column(laid.lengths.astype(np.int32), packs.samples, INPUT_IDS),
        "sample_ids": pa.ListArray.from_arrays(
            pa.array(of_pack, type=pa.int32()), laid.sample_id, type=schema.field("sample_ids").type
        ),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _token_columns(rows: Rows, lengths: np.ndarray) -> dict[str, pa.Array]:
    """The columns with an entry a token, in lists of `lengths`."""
    labels = np.where(rows.scored, rows.input_ids, IGNORED_LABEL).astype(np.int32)
    columns = {
        "input_ids": list_column(rows.input_ids, lengths, INPUT_IDS),
        "labels": list_column(labels, lengths, INPUT_IDS),
        "loss_weights": list_column(rows.loss_weights, lengths, FLOATS),
    }
    if rows.behavior_logprobs is not None:
        columns["behavior_logprobs"] = list_column(rows.behavior_logprobs, lengths, FLOATS)
    return columns
