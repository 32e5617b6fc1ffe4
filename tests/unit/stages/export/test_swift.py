"""What `swift` can hold of samples in general: ends of turns, unscored ends, a lead, weights of 0."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pear_data.chat import tokenizers
from pear_data.errors import PearError, UsageError
from pear_data.stages.export.jsonl import table_lines
from pear_data.stages.export.rows import Rows
from pear_data.stages.export.swift import _admitted, _control_tokens, _ControlTokens, _table

END = 2


def rows_of(*samples):
    """Rows of (ids, weights) with a weight of None where a token is not scored."""
    names = pa.array([f"s{number}" for number in range(len(samples))])
    weights = [weight for _, of_sample in samples for weight in of_sample]
    return Rows(
        sample_id=names,
        source=names,
        record=None,
        lengths=np.array([len(ids) for ids, _ in samples]),
        input_ids=np.array([token for ids, _ in samples for token in ids], dtype=np.int32),
        scored=np.array([weight is not None for weight in weights]),
        loss_weights=np.array([weight or 0 for weight in weights], dtype=np.float32),
        behavior_logprobs=None,
    )


WHOLE = ([7, 8, 9, END], [None, None, 0.5, 1])


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (WHOLE, None),
        (([*WHOLE[0], 5, 5], [*WHOLE[1], None, None]), None),  # what follows is left away
        (([7, 8, 9], [None, 0.5, 1]), "no_end_of_turn"),
        (([7, 8, 9, END], [None, None, 0.5, None]), "no_end_of_turn"),
        # Two turns: between them an end that is not scored, which ms-swift would score.
        (([7, 8, END, 5, 9, END], [None, 0.5, None, None, 0.5, 1]), "end_of_turn_unscored"),
        (([7, 8, END, 5, 9, END], [None, 0.5, 1, None, 0.5, 1]), None),
        (([7, END, 8, END], [None, None, 0.5, 1]), None),  # the end of a prompt's turn stays unscored
    ],
)
def test_which_samples_ms_swift_would_train_as_they_are(sample, reason):
    rows, left_out = _admitted(rows_of(WHOLE, sample, WHOLE), _ControlTokens(END, []))
    assert {why: count for why, count in left_out.items() if count} == ({reason: 1} if reason else {})
    assert rows.sample_id.to_pylist() == (["s0", "s2"] if reason else ["s0", "s1", "s2"])
    assert (rows.input_ids[rows.offsets[1:] - 1] == END).all()


@pytest.mark.parametrize("weight", [0.0, -0.5])
def test_a_token_that_would_lose_its_label_is_refused(weight):
    with pytest.raises(
        PearError, match="sample 's1' has a weight of .*takes a token of no or negative weight"
    ):
        _admitted(rows_of(WHOLE, (WHOLE[0], [None, None, weight, 1])), _ControlTokens(END, []))


def test_what_ms_swift_puts_in_front_is_not_written_twice():
    tokens = _ControlTokens(END, [7])
    rows, _ = _admitted(rows_of(WHOLE), tokens)
    (row,) = map(json.loads, table_lines(_table(rows, len(tokens.lead))).splitlines())
    assert row["messages"][0]["content"] == {"token_ids": [8, 9, END], "loss_scale": [0.0, 0.5, 1.0]}
    with pytest.raises(PearError, match="sample 's1' does not begin with the ids"):
        _admitted(rows_of(WHOLE, ([6, *WHOLE[0][1:]], WHOLE[1])), tokens)


@pytest.mark.parametrize(
    ("eos", "full", "reason"),
    [(None, [5], "no end-of-sequence token"), (END, [1, 5, END], "tokens behind every text")],
)
def test_tokenizers_that_ms_swift_would_disagree_with(monkeypatch, tmp_path, eos, full, reason):
    def encode(text, add_special_tokens=True):
        return full if add_special_tokens else [5]

    tokenizer = SimpleNamespace(eos_token_id=eos, encode=encode)
    monkeypatch.setattr(tokenizers, "load_tokenizer", lambda path: tokenizer)
    with pytest.raises(UsageError, match=reason):
        _control_tokens(SimpleNamespace(path=tmp_path))
