"""Rows of an export on their way into TRL: what must hold of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset


def require_columns(name: str, columns: Sequence[str], required: Sequence[str]) -> None:
    missing = [column for column in required if column not in columns]
    if missing:
        raise ValueError(
            f"the {name} dataset has no {', '.join(missing)}: train on what `pear-data export --format hf` wrote"
        )


def require_padding_free(name: str, padding_free: bool, packing: bool) -> None:
    if packing or not padding_free:
        raise ValueError(
            f"the {name} dataset is packed already (seq_lengths): set SFTConfig(packing=False, padding_free=True, "
            "max_length=None), or its packs would be taken apart and padded"
        )


def refusing_longer_rows(
    name: str, dataset: Dataset | IterableDataset, limit: int
) -> Dataset | IterableDataset:
    """The dataset, none of whose rows has more tokens than `limit`; a stream is looked at as it flows."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(partial(_refuse_longer_rows, name=name, limit=limit), batched=True)
    for table in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000):
        _refuse_longer(name, pc.max(pc.list_value_length(table["input_ids"])).as_py(), limit)
    return dataset


def _refuse_longer_rows(rows: Mapping[str, list[Any]], name: str, limit: int) -> Mapping[str, list[Any]]:
    _refuse_longer(name, max(map(len, rows["input_ids"])), limit)
    return rows


def _refuse_longer(name: str, longest: int, limit: int) -> None:
    if longest > limit:
        raise ValueError(
            f"the {name} dataset has a row of {longest} tokens and max_length is {limit}, where TRL would cut ids and "
            "labels but not weights: set SFTConfig(max_length=None) or a larger one, or export with --max-length"
        )
