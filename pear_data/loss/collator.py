"""Batches of the exported dataset: labels and loss weights kept together, padded or flattened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pear_data.loss.alignment import IGNORE_INDEX

WEIGHTS = "loss_weights"
BEHAVIOR = "behavior_logprobs"
PACKED = "seq_lengths"
TOKEN_COLUMNS = ("input_ids", "attention_mask", "labels", WEIGHTS, BEHAVIOR)
_PADDING = {"attention_mask": 0, "labels": IGNORE_INDEX, WEIGHTS: 0.0, BEHAVIOR: 0.0}


class PearCollator:
    """Collate rows of `input_ids`, `labels`, `loss_weights` and, where they have them, `attention_mask` and
    `behavior_logprobs` (`export --live`); other columns are dropped.

    The columns of a row (lists, numpy arrays or tensors) have one length; `loss_weights[t]` multiplies the loss of
    `labels[t]`, the label of the same index as `input_ids[t]`. Batches are int64, weights and log-probs float32.
    Padding is masked and unscored, so any id serves as `pad_token_id`.

    Padded (default): `input_ids`, `attention_mask`, `labels`, `loss_weights`, all [rows, longest], padded on the right,
    `longest` rounded up to a multiple of `pad_to_multiple_of`.

    `padding_free=True`: the rows, and the samples of packs (`hf-packed`, with `seq_lengths`), laid end to end as one
    row of all their tokens, with `position_ids` starting again at 0 for each, the boundaries as flash attention takes
    them (`cu_seq_lens_q`, `cu_seq_lens_k` int32 [rows + 1], ints `max_length_q`, `max_length_k`) and `seq_idx` int32.
    The first label of each row is -100 and its weight 0, so no token is predicted from the row before it. There is no
    attention mask, and `use_cache` is False: only then does transformers read the restarting positions as separate
    sequences under eager and sdpa attention; with a cache it attends across them without a word. `pad_to_multiple_of`
    adds one sequence of unscored padding at the end. Recurrent and convolutional layers (Mamba, Qwen3-Next, LFM2) keep
    rows apart only with their GPU kernels, if at all: train those padded. A streamed dataset needs
    `accelerator_config={"dispatch_batches": False}`.

    `require_weights=False` takes rows without `loss_weights` too, for evaluation; their batch has none.

    Each call raises ValueError, naming the row, for a missing column (the Trainer removes `loss_weights` unless
    `remove_unused_columns=False`), lengths that differ, non-finite values, packs to be padded, and weights where no
    label is scored, which is what weights shifted by one look like.
    """

    def __init__(
        self,
        pad_token_id: int,
        padding_free: bool = False,
        pad_to_multiple_of: int | None = None,
        *,
        require_weights: bool = True,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.padding_free = padding_free
        self.pad_to_multiple_of = pad_to_multiple_of
        self.require_weights = require_weights

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        samples = [one for i, feature in enumerate(features) for one in self._samples(feature, i)]
        columns = self._columns(sample for _, sample in samples)
        rows = [_row(sample, place, columns, self.padding_free) for place, sample in samples]
        return self._flattened(rows) if self.padding_free else self._padded(rows)

    def _samples(self, feature: Mapping[str, Any], index: int) -> list[tuple[str, Mapping[str, Any]]]:
        """The samples of a pack, a row that is no pack being its only one, and what to call them in errors."""
        if PACKED not in feature:
            return [(_place(feature, index), feature)]
        place = f"pack {index} of the batch"
        if not self.padding_free:
            raise ValueError(f"{place} would attend across its samples: batch packs with padding_free=True")
        lengths = torch.as_tensor(feature[PACKED]).tolist()
        columns = {name: torch.as_tensor(feature[name]) for name in TOKEN_COLUMNS if name in feature}
        if any(len(column) != sum(lengths) for column in columns.values()):
            raise ValueError(f"{place} has columns of another length than its seq_lengths: export it again")
        parts = zip(*(torch.split(column, lengths) for column in columns.values()), strict=True)
        names = feature.get("sample_ids") or [None] * len(lengths)
        return [
            (place if name is None else f"sample {name!r}", dict(zip(columns, part, strict=True)))
            for name, part in zip(names, parts, strict=True)
        ]

    def _columns(self, samples: Iterable[Mapping[str, Any]]) -> list[str]:
        """Those every row of this batch must have."""
        found = {name for sample in samples for name in sample}
        optional = [BEHAVIOR] if self.require_weights else [WEIGHTS, BEHAVIOR]
        return [name for name in TOKEN_COLUMNS if name not in (*optional, "attention_mask") or name in found]

    def _padded(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        longest = self._rounded_up(max(len(row["input_ids"]) for row in rows))
        padding = {"input_ids": self.pad_token_id, **_PADDING}
        return {
            name: torch.stack(
                [
                    torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=padding[name])
                    for row in rows
                ]
            )
            for name in rows[0]
        }

    def _flattened(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        total = sum(len(row["input_ids"]) for row in rows)
        rows = rows + self._filler(self._rounded_up(total) - total, like=rows[0])
        flat = {name: torch.cat([row[name] for row in rows]) for name in rows[0] if name != "attention_mask"}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        flat["labels"][starts] = IGNORE_INDEX
        for name in {WEIGHTS, BEHAVIOR} & flat.keys():
            flat[name][starts] = 0.0
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

    def _filler(self, length: int, like: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        if length == 0:
            return []
        padding = {"input_ids": self.pad_token_id, **_PADDING}
        return [{name: column.new_full((length,), padding[name]) for name, column in like.items()}]

    def _rounded_up(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple


def _place(feature: Mapping[str, Any], index: int) -> str:
    return f"sample {feature['sample_id']!r}" if "sample_id" in feature else f"row {index} of the batch"


def _row(
    feature: Mapping[str, Any], place: str, columns: Sequence[str], padding_free: bool
) -> dict[str, Tensor]:
    """One checked row as tensors; `place` names it in errors."""
    missing = [name for name in columns if name not in feature and name != "attention_mask"]
    if missing:
        raise ValueError(
            f"{place} has no {', '.join(missing)}: train on an export of `pear-data export --format hf`, with "
            "TrainingArguments(remove_unused_columns=False)"
        )
    row = {
        name: torch.as_tensor(
            feature[name], dtype=torch.float32 if name in (WEIGHTS, BEHAVIOR) else torch.int64
        )
        for name in columns
        if name in feature
    }
    row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
    lengths = {name: len(column) for name, column in row.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{place} has columns of different lengths ({found}): export it again")
    unscored = row["labels"] == IGNORE_INDEX
    for name in {WEIGHTS, BEHAVIOR} & row.keys():
        if not (row[name].isfinite() | (unscored & (name == BEHAVIOR))).all():
            raise ValueError(f"{place} has non-finite {name}: weight and export it again")
    if WEIGHTS in row and ((row[WEIGHTS] != 0) & unscored).any():
        raise ValueError(
            f"{place} has loss_weights where labels are -100: give each weight the index of its label, unshifted"
        )
    if padding_free and not row["attention_mask"].all():
        raise ValueError(
            f"{place} is padded already (attention_mask has zeros): padding_free takes unpadded rows"
        )
    return row
