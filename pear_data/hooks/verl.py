"""verl's SFT trainer on `pear-data export --format verl`: a dataset whose loss mask is the weights.

    data.custom_cls.path=pkg://pear_data.hooks.verl data.custom_cls.name=PearVerlDataset

verl multiplies log-probs by the loss mask, whatever its values, and divides by the mask's sum over the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import load_dataset
from torch import Tensor
from torch.utils.data import Dataset

_COLUMNS = {"input_ids", "loss_weights", "sample_id", "source"}


class PearVerlDataset(Dataset[dict[str, Tensor]]):
    """Rows of an export, as verl's SFT trainer and its collator for `pad_mode: no_padding` take them.

    A row is `input_ids` int64 [T], `position_ids` int64 [T] and `loss_mask` float32 [T]: the weights, unshifted, with
    loss_mask[0] = 0, because verl shifts them itself. Rows are read from a memory map that the ranks and the loader
    workers of a machine share. `max_samples`, where it is not negative, takes that many rows from the front.

    Of `config` (verl's `data`) these are read: `pad_mode`, `max_length`, `truncation` ("error" or "right").

    Raises ValueError for files of another format, a row longer than `max_length` under "error", and a padding or
    truncation under which weights would be lost.
    """

    def __init__(
        self,
        parquet_files: str | Sequence[str],
        tokenizer: Any,
        config: Mapping[str, Any],
        processor: Any = None,
        max_samples: int = -1,
    ) -> None:
        _refuse_settings(config)
        files = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        rows = load_dataset("parquet", data_files=files, split="train")
        if set(rows.column_names) != _COLUMNS:
            raise ValueError(
                f"{files[0]} has the columns {', '.join(rows.column_names)}: train on what "
                "`pear-data export --format verl` wrote"
            )
        if 0 <= max_samples < len(rows):
            rows = rows.select(range(max_samples))
        self.max_length = int(config.get("max_length", 1024))
        if config.get("truncation", "error") == "error":
            _refuse_longer(rows, self.max_length)
        self.rows = rows.select_columns(["input_ids", "loss_weights"]).with_format("torch")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[int(index)]
        ids = row["input_ids"][: self.max_length]
        return {
            "input_ids": ids.long(),
            "position_ids": torch.arange(len(ids)),
            "loss_mask": row["loss_weights"][: self.max_length],
        }


def _refuse_settings(config: Mapping[str, Any]) -> None:
    if (mode := config.get("pad_mode")) != "no_padding":
        raise ValueError(
            f"data.pad_mode is {mode}, and verl's loss of padded rows turns masks into booleans, so that every weight "
            "becomes 1: set data.pad_mode=no_padding"
        )
    if (truncation := config.get("truncation", "error")) not in ("error", "right"):
        raise ValueError(
            f"data.truncation is {truncation}, which takes away the context that the weights were made with: set "
            "data.truncation=error or right"
        )


def _refuse_longer(rows: Any, limit: int) -> None:
    for table in rows.with_format("arrow").iter(batch_size=10_000):
        lengths = pc.list_value_length(table["input_ids"])
        if (longest := pc.max(lengths).as_py()) > limit:
            name = table["sample_id"][pc.index(lengths, longest).as_py()].as_py()
            raise ValueError(
                f"sample {name!r} has {longest} tokens and data.max_length is {limit}: set a larger one, cut with "
                "`pear-data export --max-length`, or set data.truncation=right"
            )
