"""`swift`: JSON lines for ms-swift, whole samples as token ids, so that no template of its own renders anything.

ms-swift takes an assistant message of token ids with a loss scale each. One such message holds the whole sample, the
prompt with scale 0; with `--use_chat_template false` nothing is put around it. What follows the last scored token is
left away, so that the sample ends in the end-of-sequence token: after any other, ms-swift would add one, of weight 1.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pear_data.errors import PearError, UsageError
from pear_data.schema import DOUBLES, INPUT_IDS
from pear_data.stages.export.check import weights_fault
from pear_data.stages.export.formats import Format
from pear_data.stages.export.jsonl import opener, table_lines
from pear_data.stages.export.rows import Rows
from pear_data.store import Store
from pear_data.store.columns import list_column

FLAGS = "--use_chat_template false --is_binary_loss_scale false --strict true"
NO_END = "no_end_of_turn"
END_UNSCORED = "end_of_turn_unscored"


def swift_format(store: Store) -> Format:
    """A line a sample, for the tokenizer that made the corpus.

    Raises:
        UsageError: the tokenizer has no end-of-sequence token, or puts tokens behind every text.
    """
    tokens = _control_tokens(store)
    return Format(
        ".jsonl",
        "loss_scale[t] multiplies -log p(token_ids[t] | token_ids[<t]): unshifted; 0 where not scored",
        "sum(loss_scale * nll) / count(loss_scale > 0), over gradient accumulation and ranks",
        opener(lambda rows: table_lines(_table(rows, len(tokens.lead)))),
        f"ms-swift drops every weight without a word unless it gets: {FLAGS} (pear_data/hooks/ms-swift.md)",
        admitted=lambda rows: _admitted(rows, tokens),
        flags=FLAGS,
    )


@dataclass(frozen=True, slots=True)
class _ControlTokens:
    """The end-of-sequence id, and the ids that the tokenizer, and so ms-swift, puts in front of any text."""

    end: int
    lead: list[int]


def _control_tokens(store: Store) -> _ControlTokens:
    from pear_data.chat.tokenizers import load_tokenizer
    from pear_data.corpus.stored_tokenizer import FOLDER

    tokenizer = load_tokenizer(str(store.path / FOLDER))
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the corpus's tokenizer has no end-of-sequence token, and ms-swift trains none without: use another format"
        )
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    if full[-len(plain) :] != plain:
        raise UsageError(
            "the corpus's tokenizer puts tokens behind every text, and ms-swift would give them weight 1: "
            "use another format"
        )
    return _ControlTokens(tokenizer.eos_token_id, full[: len(full) - len(plain)])


def _admitted(rows: Rows, tokens: _ControlTokens) -> tuple[Rows, Counter[str]]:
    """Samples whose last scored token ends the sequence, up to there.

    Raises:
        PearError: a scored token's weight is not above 0, or a sample lacks the tokens that ms-swift puts in front.
    """
    rows = rows.without_unscored_tail()
    if (bad := np.flatnonzero(rows.scored & (rows.loss_weights <= 0))).size:
        raise PearError(
            f"{rows.name_at(int(bad[0]))} has a weight of {rows.loss_weights[bad[0]]:g}: ms-swift takes a token of no "
            'or negative weight for an unscored one; leave such samples out (--where "label = 1"), or use format hf'
        )
    _require_lead(rows, tokens.lead)
    is_end = rows.input_ids == tokens.end
    ends = is_end[rows.offsets[1:] - 1]
    # Behind a scored token, ms-swift takes an unscored end for its own and gives it weight 1.
    taken = np.zeros(len(is_end), dtype=np.bool_)
    taken[1:] = is_end[1:] & ~rows.scored[1:] & rows.scored[:-1]
    taken[rows.offsets[:-1]] = False
    untaken = np.add.reduceat(taken, rows.offsets[:-1], dtype=np.int64) == 0
    left_out = Counter({NO_END: int((~ends).sum()), END_UNSCORED: int((ends & ~untaken).sum())})
    return rows.take(ends & untaken), left_out


def _require_lead(rows: Rows, lead: list[int]) -> None:
    starts = rows.offsets[:-1]
    for at, token in enumerate(lead):
        found = rows.input_ids[np.minimum(starts + at, len(rows.input_ids) - 1)]
        if (other := np.flatnonzero(found != token)).size:
            raise PearError(
                f"{rows.name_at(int(starts[other[0]]))} does not begin with the ids {lead}, which ms-swift puts in "
                "front of every sample: use another format, or ingest with the tokenizer's own template"
            )


def _table(rows: Rows, lead: int) -> pa.Table:
    """One assistant message a sample, without the first `lead` tokens, which ms-swift puts there."""
    if lead:
        rows = rows.without_first(lead)
    # As float64, or the decimals would be the shortest that tell float32s apart, which are other float64s.
    weights = rows.loss_weights.astype(np.float64)
    content = pa.StructArray.from_arrays(
        [list_column(rows.input_ids, rows.lengths, INPUT_IDS), list_column(weights, rows.lengths, DOUBLES)],
        ["token_ids", "loss_scale"],
    )
    message = pa.StructArray.from_arrays([pa.array(["assistant"] * len(rows)), content], ["role", "content"])
    one_each = pa.array(np.arange(len(rows) + 1, dtype=np.int32))
    return pa.table({"messages": pa.ListArray.from_arrays(one_each, message), "sample_id": rows.sample_id})


def swift_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with one line, or None."""
    name, (message,) = f"sample {row['sample_id']!r}", row["messages"]
    ids = np.asarray(message["content"]["token_ids"])
    weights = np.asarray(message["content"]["loss_scale"], dtype=np.float64)
    if ids.dtype.kind != "i" or (ids < 0).any():
        return f"{name}: an id is no token id"
    if (weights < 0).any():
        return f"{name}: a weight is negative, which ms-swift takes for an unscored token"
    if len(weights) and weights[-1] == 0:
        return f"{name}: the last token has no weight, so ms-swift would end the sample otherwise"
    return weights_fault(name, weights, len(ids))
