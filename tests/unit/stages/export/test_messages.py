"""What `messages` can hold: conversations of plain text, one weight each."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from pear_data.config import ExportSettings
from pear_data.errors import PearError, UsageError
from pear_data.stages.export.messages import _admitted, _objects, messages_fault, messages_format
from pear_data.stages.export.rows import Rows
from pear_data.store import writable_store

NAMED = (None, None)
PLAIN = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TWO_TURNS = {"messages": [*PLAIN["messages"], *PLAIN["messages"]]}
TOOLS = {**PLAIN, "tools": [{"type": "function", "function": {"name": "f"}}]}
THOUGHT = {"messages": [PLAIN["messages"][0], {**PLAIN["messages"][1], "reasoning_content": "hm"}]}


def rows_of(*samples):
    """Rows of (record, weights), each sample's first token unscored."""
    names = pa.array([f"s{number}" for number in range(len(samples))])
    lengths = np.array([len(weights) + 1 for _, weights in samples])
    weights = np.array([w for _, of_sample in samples for w in (0, *of_sample)], dtype=np.float32)
    scored = np.ones(len(weights), dtype=np.bool_)
    scored[np.cumsum(lengths) - lengths] = False
    return Rows(
        sample_id=names,
        source=names,
        record=pa.array([json.dumps(record) for record, _ in samples]),
        lengths=lengths,
        input_ids=np.arange(len(weights), dtype=np.int32),
        scored=scored,
        loss_weights=weights,
        behavior_logprobs=None,
    )


def test_what_is_no_plain_text_is_left_out():
    rows, left_out = _admitted(
        rows_of((PLAIN, [0.5, 0.5]), (TOOLS, [1]), (THOUGHT, [1]), (TWO_TURNS, [2])), NAMED
    )
    assert rows.sample_id.to_pylist() == ["s0", "s3"]
    assert left_out == {"not_plain_text": 2}


@pytest.mark.parametrize(("last_only", "weights"), [(False, [0, 2, 0, 2]), (True, [0, 0, 0, 2])])
def test_every_scored_turn_has_the_weight(last_only, weights):
    (row,) = _objects(rows_of((TWO_TURNS, [2.0, 2.0])), NAMED, last_only)
    assert [message["loss_weight"] for message in row["messages"]] == weights
    assert row["loss_multiplier"] == 2.0
    assert messages_fault(row) is None


@pytest.mark.parametrize("weights", [[0.5, 0.25], [-0.5, -0.5]])
def test_weights_that_are_not_one_a_sample(weights):
    with pytest.raises(PearError, match="sample 's1' has weights that differ or are negative"):
        _admitted(rows_of((PLAIN, [0.5, 0.5]), (PLAIN, weights)), NAMED)


def test_a_weight_that_makes_an_answer_a_prompt():
    with pytest.raises(
        PearError, match="sample 's1' has a weight of 5e-07, .* takes an answer of .* for a prompt"
    ):
        _admitted(rows_of((PLAIN, [0]), (PLAIN, [5e-7])), NAMED)


def test_samples_that_came_as_ids():
    with pytest.raises(PearError, match="came as token ids"):
        _admitted(rows_of(({"source": "x"}, [0.5])), NAMED)


def test_samples_that_are_turns(folder):
    with writable_store(folder) as store:
        store.manifest.stages["corpus"].settings |= {"turns": "all", "prompt_field": None}
        with pytest.raises(UsageError, match="--turns all"):
            messages_format(store, ExportSettings(out="out", format="messages", weights="uniform"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: row["messages"][0].update(loss_weight=0.5), "no answer has a weight"),
        (lambda row: row["messages"][1].update(loss_weight=0.25), "other weights than loss_multiplier"),
        (lambda row: row.update(loss_multiplier=0.1), "other weights than loss_multiplier"),
        (
            lambda row: row["messages"][1].update(loss_weight=row.update(loss_multiplier=5e-7) or 5e-7),
            "for a prompt",
        ),
    ],
)
def test_faults(change, reason):
    (row,) = _objects(rows_of((PLAIN, [0.5])), NAMED, False)
    change(row)
    assert reason in messages_fault(row)
