"""The corpus as later stages read it: one batch of flat token arrays per row group."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pear_data.store import Store
from pear_data.store.columns import flat_values, list_lengths, offsets_of
from pear_data.store.manifest import Shard
from pear_data.tokens import TokenBatch


def token_batches(store: Store, shard: Shard) -> Iterator[TokenBatch]:
    """The samples of a corpus shard, a row group (about a million tokens) at a time, in the shard's order.

    Token ids are not copied; the loss mask is unpacked from bits to bytes.

    Raises:
        MismatchError: the shard's file is gone or damaged.
    """
    for table in store.row_groups(shard, ["sample_id", "input_ids", "loss_mask"]):
        yield token_batch(table)


def token_batch(table: pa.Table) -> TokenBatch:
    """Rows of the corpus (schema: `pear_data.schema.CORPUS`) as a batch."""
    return TokenBatch(
        sample_ids=table["sample_id"].to_pylist(),
        input_ids=flat_values(table["input_ids"]),
        loss_mask=flat_values(table["loss_mask"]),
        offsets=offsets_of(list_lengths(table["input_ids"])),
    )
