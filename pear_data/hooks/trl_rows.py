"""Rows of an export on their way into TRL: what must hold of a dataset, and batches of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset

from pear_data.loss import PearCollator

WEIGHTS = "loss_weights"
BEHAVIOR = "behavior_logprobs"
PACKED = "seq_lengths"
TOKEN_COLUMNS = ("input_ids", "attention_mask", "labels", WEIGHTS, BEHAVIOR)


class SFTCollator:
    """PearCollator for TRL's loaders: packs laid out again as their samples, and evaluation rows without weights."""

    def __init__(self, collator: PearCollator) -> None:
        self.collator = collator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [sample for feature in features for sample in _samples(feature)]
        if not any(WEIGHTS in row for row in rows):
            batch = self.collator([{**row, WEIGHTS: [0.0] * len(row["input_ids"])} for row in rows])
            del batch[WEIGHTS]
            return batch
        batch = self.collator(rows)
        if BEHAVIOR in rows[0] and BEHAVIOR not in batch:
            batch[BEHAVIOR] = self.collator([{**row, WEIGHTS: row[BEHAVIOR]} for row in rows])[WEIGHTS]
        return batch


def _samples(feature: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The samples of a pack; a row that is no pack is its only sample."""
    if PACKED not in feature:
        return [feature]
    lengths = torch.as_tensor(feature[PACKED]).tolist()
    columns = {
        name: torch.split(torch.as_tensor(feature[name]), lengths)
        for name in TOKEN_COLUMNS
        if name in feature
    }
    return [dict(zip(columns, sample, strict=True)) for sample in zip(*columns.values(), strict=True)]


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
