"""Batches against the rows they came from."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening

from pear_data.loss import PearCollator

PAD = 99
ROWS: list[dict[str, Any]] = [
    {
        "sample_id": "a",
        "source": "x",
        "input_ids": [1, 2, 3],
        "attention_mask": [1, 1, 1],
        "labels": [-100, 2, 3],
        "loss_weights": [0.0, 0.5, 2.0],
    },
    {
        "sample_id": "b",
        "source": "x",
        "input_ids": [4, 5, 6, 7, 8],
        "attention_mask": [1, 1, 1, 1, 1],
        "labels": [-100, -100, 6, 7, 8],
        "loss_weights": [0.0, 0.0, 0.0, -1.0, 1.5],
    },
]


def without(row: dict[str, Any], *columns: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in columns}


def test_padded() -> None:
    batch = PearCollator(PAD)(ROWS)
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[1, 2, 3, PAD, PAD], [4, 5, 6, 7, 8]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "labels": [[-100, 2, 3, -100, -100], [-100, -100, 6, 7, 8]],
        "loss_weights": [[0, 0.5, 2, 0, 0], [0, 0, 0, -1, 1.5]],
    }
    assert {name: column.dtype for name, column in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "loss_weights": torch.float32,
    }


@pytest.mark.parametrize(("multiple", "longest"), [(None, 5), (1, 5), (5, 5), (4, 8)])
def test_pad_to_multiple_of(multiple: int | None, longest: int) -> None:
    batch = PearCollator(PAD, pad_to_multiple_of=multiple)(ROWS)
    assert {column.shape for column in batch.values()} == {(2, longest)}
    assert batch["loss_weights"].sum() == 3


def test_padding_free() -> None:
    batch = PearCollator(PAD, padding_free=True)(ROWS)
    assert batch["loss_weights"].tolist() == [[0, 0.5, 2, 0, 0, 0, -1, 1.5]]
    assert batch["loss_weights"].dtype == torch.float32
    assert batch["use_cache"] is False
    assert "attention_mask" not in batch


def test_padding_free_has_the_boundaries_transformers_gives() -> None:
    """Rows scored from their first token on, so that the first label of each row has to be taken out."""
    rows = [
        {**row, "labels": row["input_ids"], "loss_weights": [1.0] * len(row["input_ids"])} for row in ROWS
    ]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        [without(row, "loss_weights") for row in rows]
    )
    ours = PearCollator(PAD, padding_free=True)(rows)
    assert set(ours) == set(theirs) | {"loss_weights", "use_cache"}
    for name, column in theirs.items():
        if isinstance(column, torch.Tensor):
            assert torch.equal(ours[name], column)
            assert ours[name].dtype == column.dtype
        else:
            assert ours[name] == column
    assert ours["loss_weights"].tolist() == [[0, 1, 1, 0, 1, 1, 1, 1]]


def test_padding_free_pads_with_a_sequence_of_its_own() -> None:
    batch = PearCollator(PAD, padding_free=True, pad_to_multiple_of=6)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, PAD, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100, 6, 7, 8, -100, -100, -100, -100]]
    assert batch["loss_weights"].tolist() == [[0, 0.5, 2, 0, 0, 0, -1, 1.5, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 8, 12]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]]


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("convert", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_arrays_and_tensors_are_lists(padding_free: bool, convert: Any) -> None:
    collator = PearCollator(PAD, padding_free=padding_free)
    converted = [
        {name: convert(value) if isinstance(value, list) else value for name, value in row.items()}
        for row in ROWS
    ]
    kept = copy.deepcopy(converted[0])
    batch = collator(converted)
    for name, column in collator(ROWS).items():
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(column))
    collator(converted[:1])
    for name, value in kept.items():
        assert list(converted[0][name]) == list(value), "the rows themselves must not change"


def test_a_row_without_attention_mask_is_all_tokens() -> None:
    bare = [without(row, "attention_mask", "sample_id", "source") for row in ROWS]
    assert torch.equal(PearCollator(PAD)(bare)["attention_mask"], PearCollator(PAD)(ROWS)["attention_mask"])


def test_an_attention_mask_with_holes_is_kept_or_refused() -> None:
    row = {**ROWS[0], "attention_mask": [0, 1, 1]}
    assert PearCollator(PAD)([row])["attention_mask"].tolist() == [[0, 1, 1]]
    with pytest.raises(ValueError, match=r"sample 'a' is padded already"):
        PearCollator(PAD, padding_free=True)([row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_weights": [0.0, 1.0]}, r"'b' has columns of different lengths \(.*labels 5, loss_weights 2"),
        ({"labels": [-100, 2]}, r"'b' has columns of different lengths"),
        ({"attention_mask": [1, 1]}, r"'b' has columns of different lengths"),
        ({"loss_weights": [0.0, 0.0, float("nan"), 1.0, 1.0]}, r"'b' has non-finite loss_weights"),
        ({"loss_weights": [0.0, 0.0, float("inf"), 1.0, 1.0]}, r"'b' has non-finite loss_weights"),
        (
            {"loss_weights": [0.0, 0.5, 1.0, 1.0, 0.0]},
            r"'b' has loss_weights where labels are -100: .*unshifted",
        ),
    ],
)
def test_unusable_rows_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PearCollator(PAD)([ROWS[0], {**ROWS[1], **change}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["input_ids", "labels", "loss_weights"])
def test_a_missing_column_is_named_with_the_remedy(column: str) -> None:
    row = without(ROWS[1], column, "sample_id")
    with pytest.raises(
        ValueError, match=rf"row 1 of the batch has no {column}: .*remove_unused_columns=False"
    ):
        PearCollator(PAD)([ROWS[0], row])


LIVE = [{**row, "behavior_logprobs": [-0.5 * t for t in range(len(row["labels"]))]} for row in ROWS]
PACK = {
    name: LIVE[0][name] + LIVE[1][name]
    for name in ("input_ids", "labels", "loss_weights", "behavior_logprobs")
} | {"position_ids": [0, 1, 2, 0, 1, 2, 3, 4], "seq_lengths": [3, 5], "sample_ids": ["a", "b"]}


@pytest.mark.parametrize("padding_free", [False, True])
def test_behavior_logprobs_come_along(padding_free: bool) -> None:
    batch = PearCollator(PAD, padding_free, pad_to_multiple_of=6)(LIVE)
    bare = PearCollator(PAD, padding_free, pad_to_multiple_of=6)(ROWS)
    found = batch.pop("behavior_logprobs")
    assert found.dtype == torch.float32
    if padding_free:
        assert found.tolist() == [[0, -0.5, -1, 0, -0.5, -1, -1.5, -2, 0, 0, 0, 0]]
    else:
        assert found.tolist() == [[0, -0.5, -1, 0, 0, 0], [0, -0.5, -1, -1.5, -2, 0]]
    assert batch.keys() == bare.keys()
    with pytest.raises(ValueError, match="sample 'b' has no behavior_logprobs"):
        PearCollator(PAD, padding_free)([LIVE[0], ROWS[1]])


def test_behavior_logprobs_are_finite_where_a_label_is_scored() -> None:
    def with_first(value: float, index: int) -> dict[str, Any]:
        values = list(LIVE[0]["behavior_logprobs"])
        values[index] = value
        return {**LIVE[0], "behavior_logprobs": values}

    PearCollator(PAD)([with_first(float("nan"), 0)])
    with pytest.raises(ValueError, match="'a' has non-finite behavior_logprobs"):
        PearCollator(PAD)([with_first(float("-inf"), 1)])


@pytest.mark.parametrize("convert", [list, np.asarray, torch.tensor], ids=["lists", "numpy", "torch"])
def test_packs_are_laid_out_as_their_samples(convert: Any) -> None:
    names = ("input_ids", "labels", "loss_weights", "behavior_logprobs", "seq_lengths")
    pack = PACK | {name: convert(PACK[name]) for name in names}
    apart = PearCollator(PAD, padding_free=True)([*LIVE, LIVE[0]])
    packed = PearCollator(PAD, padding_free=True)([pack, LIVE[0]])
    assert packed.keys() == apart.keys()
    for name, column in apart.items():
        assert torch.equal(torch.as_tensor(packed[name]), torch.as_tensor(column))


@pytest.mark.parametrize(
    ("change", "padding_free", "message"),
    [
        ({}, False, "pack 0 of the batch would attend across its samples: .*padding_free=True"),
        ({"seq_lengths": [3, 4]}, True, "pack 0 of the batch has columns of another length"),
        ({"loss_weights": [0.0] * 7 + [float("nan")]}, True, "sample 'b' has non-finite loss_weights"),
        ({"labels": [-100] * 8}, True, "sample 'a' has loss_weights where labels are -100"),
    ],
)
def test_unusable_packs_are_named(change: dict[str, Any], padding_free: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PearCollator(PAD, padding_free)([PACK | change])


@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_without_weights_where_none_are_required(padding_free: bool) -> None:
    collator = PearCollator(PAD, padding_free, pad_to_multiple_of=6, require_weights=False)
    batch = collator(ROWS)
    del batch["loss_weights"]
    bare = collator([without(row, "loss_weights") for row in ROWS])
    assert bare.keys() == batch.keys()
    assert torch.equal(bare["labels"], batch["labels"])
    with pytest.raises(ValueError, match="sample 'b' has no loss_weights"):
        collator([ROWS[0], without(ROWS[1], "loss_weights")])
