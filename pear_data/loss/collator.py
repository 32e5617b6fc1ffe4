"""Batches of the exported dataset: labels and loss weights kept together, padded or flattened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
_PADDING = {"attention_mask": 0, "labels": IGNORE_INDEX, "loss_weights": 0.0}
_REQUIRED = ("input_ids", "labels", "loss_weights")


class PearCollator:
    """Collate rows of `input_ids`, `labels`, `loss_weights` and optionally `attention_mask`; other columns are dropped.

    The columns of a row (lists, numpy arrays or tensors) have one length; `loss_weights[t]` multiplies the loss of
    `labels[t]`, the label of the same index as `input_ids[t]`. Batches are int64, the weights float32. Padding is
    masked and unscored, so any id serves as `pad_token_id`.

    Padded (default): `input_ids`, `attention_mask`, `labels`, `loss_weights`, all [rows, longest], padded on the right,
    `longest` rounded up to a multiple of `pad_to_multiple_of`.

    `padding_free=True`: the rows laid end to end as one row of all their tokens, with `position_ids` starting again at
    0 for each, the boundaries as flash attention takes them (`cu_seq_lens_q`, `cu_seq_lens_k` int32 [rows + 1], ints
    `max_length_q`, `max_length_k`) and `seq_idx` int32. The first label of each row is -100 and its weight 0, so
    no token is predicted from the row before it. There is no attention mask, and `use_cache` is False: only then does
    transformers read the restarting positions as separate sequences under eager and sdpa attention; with a cache it
    attends across them without a word. `pad_to_multiple_of` adds one sequence of unscored padding at the end.
    Recurrent and convolutional layers (Mamba, Qwen3-Next, LFM2) keep rows apart only with their GPU kernels, if at
    all: train those padded. A streamed dataset needs `accelerator_config={"dispatch_batches": False}`.

    Each call raises ValueError, naming the row, for a missing column (the Trainer removes `loss_weights` unless
    `remove_unused_columns=False`), lengths that differ, non-finite weights, and weights where no label is scored,
    which is what weights shifted by one look like.
    """

    def __init__(
        self, pad_token_id: int, padding_free: bool = False, pad_to_multiple_of: int | None = None
    ) -> None:
        self.pad_token_id = pad_token_id
        self.padding_free = padding_free
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [_row(feature, _place(feature, i), self.padding_free) for i, feature in enumerate(features)]
        return self._flattened(rows) if self.padding_free else self._padded(rows)

    def _padded(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        longest = self._rounded_up(max(len(row["input_ids"]) for row in rows))
        padding = {"input_ids": self.pad_token_id, **_PADDING}
        return {
            name: torch.stack(
                [
                    torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=value)
                    for row in rows
                ]
            )
            for name, value in padding.items()
        }

    def _flattened(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        total = sum(len(row["input_ids"]) for row in rows)
        rows = rows + self._filler(self._rounded_up(total) - total)
        flat = {name: torch.cat([row[name] for row in rows]) for name in _REQUIRED}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        flat["labels"][starts] = IGNORE_INDEX
        flat["loss_weights"][starts] = 0.0
        boundaries = torch.nn.functional.pad(ends, (1, 0)).int()
        max_length = int(lengths.max())
        return {
            **{name: column[None] for name, column in flat.items()},
            "position_ids": (torch.arange(int(ends[-1])) - starts.repeat_interleave(lengths))[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": max_length,
            "max_length_k": max_length,
            "seq_idx": torch.arange(len(rows), dtype=torch.int32).repeat_interleave(lengths)[None],
            "use_cache": False,
        }

    def _filler(self, length: int) -> list[dict[str, Tensor]]:
        if length == 0:
            return []
        return [
            {
                "input_ids": torch.full((length,), self.pad_token_id),
                "labels": torch.full((length,), IGNORE_INDEX),
                "loss_weights": torch.zeros(length),
            }
        ]

    def _rounded_up(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple


def _place(feature: Mapping[str, Any], index: int) -> str:
    return f"sample {feature['sample_id']!r}" if "sample_id" in feature else f"row {index} of the batch"


def _row(feature: Mapping[str, Any], place: str, padding_free: bool) -> dict[str, Tensor]:
    """One checked row as tensors; `place` names it in errors."""
    missing = [name for name in _REQUIRED if name not in feature]
    if missing:
        raise ValueError(
            f"{place} has no {', '.join(missing)}: train on an export of `pear-data export --format hf`, with "
            "TrainingArguments(remove_unused_columns=False)"
        )
    row = {
        "input_ids": torch.as_tensor(feature["input_ids"], dtype=torch.int64),
        "labels": torch.as_tensor(feature["labels"], dtype=torch.int64),
        "loss_weights": torch.as_tensor(feature["loss_weights"], dtype=torch.float32),
    }
    mask = feature.get("attention_mask")
    row["attention_mask"] = (
        torch.ones_like(row["input_ids"]) if mask is None else torch.as_tensor(mask, dtype=torch.int64)
    )
    lengths = {name: len(column) for name, column in row.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{place} has columns of different lengths ({found}): export it again")
    if not row["loss_weights"].isfinite().all():
        raise ValueError(f"{place} has non-finite loss_weights: weight and export it again")
    if ((row["loss_weights"] != 0) & (row["labels"] == IGNORE_INDEX)).any():
        raise ValueError(
            f"{place} has loss_weights where labels are -100: give each weight the index of its label, unshifted"
        )
    if padding_free and not row["attention_mask"].all():
        raise ValueError(
            f"{place} is padded already (attention_mask has zeros): padding_free takes unpadded rows"
        )
    return row
