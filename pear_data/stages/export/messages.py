"""`messages`: JSON lines of conversations with one weight each, for trainers that weight whole messages or samples.

The trainer renders and tokenizes them again. LLaMA-Factory v1 reads `messages` (parts of `type` and `value`) and their
`loss_weight`; NeMo-RL's sample weight is `loss_multiplier`. Not for ms-swift, which would give ends of turns weight 1:
there is format swift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pear_data.chat.messages import Conversation
from pear_data.config import ExportSettings
from pear_data.corpus.stored_records import NamedFields, conversation_of
from pear_data.errors import PearError, SampleError, UsageError
from pear_data.stages.export.check import weights_fault
from pear_data.stages.export.formats import Format
from pear_data.stages.export.jsonl import object_lines, opener
from pear_data.stages.export.rows import Rows
from pear_data.store import Store

NOT_TEXT = "not_plain_text"
ROLES = ("system", "user", "assistant")
LEAST_WEIGHT = 1e-6  # LLaMA-Factory takes an answer of no more for a prompt


def messages_format(store: Store, settings: ExportSettings) -> Format:
    """A line a conversation.

    Raises:
        UsageError: the weighting is not of one weight a sample, or the samples are not whole conversations.
    """
    level = store.stage(f"weights/{settings.weights}").settings["level"]
    if level not in ("sequence", "uniform"):
        raise UsageError(
            f"weights/{settings.weights} is of level {level}, and format messages has one weight a sample: make one "
            "with `pear-data weight --level sequence`, or use format swift, hf or verl"
        )
    ingest = store.stage("corpus").settings
    if ingest["turns"] == "all":
        raise UsageError(
            "this corpus was ingested with --turns all, a sample a turn, and format messages has whole conversations: "
            "ingest with --turns last, or use format swift, hf or verl"
        )
    named = ingest["prompt_field"], ingest["response_field"]
    last_only = ingest["turns"] == "last"
    return Format(
        ".jsonl",
        "loss_weight is its message's; every token of the message as the trainer renders it has it",
        "LLaMA-Factory v1: sum(w nll) / count(labels) with pear_data.hooks.llama_factory; without it a micro-batch is "
        "divided by its own sum of weights, so that those of a micro-batch of one sample cancel",
        opener(lambda rows: object_lines(_objects(rows, named, last_only))),
        "LLaMA-Factory v1 reads each message's loss_weight; NeMo-RL takes loss_multiplier: "
        "pear_data/hooks/llama-factory.md, nemo-rl.md",
        admitted=lambda rows: _admitted(rows, named),
        needs_record=True,
    )


def _admitted(rows: Rows, named: NamedFields) -> tuple[Rows, Counter[str]]:
    """Samples of plain text.

    Raises:
        PearError: a sample's weights differ or are negative, or the row came as token ids.
    """
    of_samples = np.repeat(_sample_weights(rows), rows.lengths)
    if (bad := np.flatnonzero(rows.scored & ((rows.loss_weights != of_samples) | (of_samples < 0)))).size:
        raise PearError(
            f"{rows.name_at(int(bad[0]))} has weights that differ or are negative, and format messages has one weight "
            'a sample, no less than 0: leave such samples out (--where "label = 1", say), or use format hf'
        )
    if (bad := np.flatnonzero(rows.scored & (of_samples > 0) & (of_samples <= LEAST_WEIGHT))).size:
        raise PearError(
            f"{rows.name_at(int(bad[0]))} has a weight of {of_samples[bad[0]]:g}, and LLaMA-Factory takes an answer of "
            f"no more than {LEAST_WEIGHT:g} for a prompt: weight with a higher --clip-log-weight, or use format hf"
        )
    assert rows.record is not None
    plain = np.array([_is_plain(_conversation(r, named)) for r in rows.record.to_pylist()], dtype=np.bool_)
    return rows.take(plain), Counter({NOT_TEXT: int((~plain).sum())})


def _sample_weights(rows: Rows) -> npt.NDArray[np.float32]:
    """The weight of each sample's last scored token."""
    index = np.where(rows.scored, np.arange(len(rows.scored)), 0)
    last = np.asarray(np.maximum.reduceat(index, rows.offsets[:-1]), dtype=np.int64)
    return rows.loss_weights[last]


def _conversation(record: str, named: NamedFields) -> Conversation:
    try:
        return conversation_of(record, named)
    except SampleError:
        raise PearError(
            "the corpus came as token ids, and format messages needs text: use format swift, hf or verl"
        ) from None


def _is_plain(conversation: Conversation) -> bool:
    return conversation.tools is None and all(
        set(message) <= {"role", "content"}
        and message["role"] in ROLES
        and isinstance(message.get("content"), str)
        for message in conversation.messages
    )


def _objects(rows: Rows, named: NamedFields, last_only: bool) -> Iterator[dict[str, Any]]:
    assert rows.record is not None
    weights = _sample_weights(rows).tolist()
    for name, record, weight in zip(
        rows.sample_id.to_pylist(), rows.record.to_pylist(), weights, strict=True
    ):
        conversation = conversation_of(record, named)
        weighted = conversation.assistant_indices[-1:] if last_only else conversation.assistant_indices
        messages = [
            {
                "role": message["role"],
                "content": [{"type": "text", "value": message["content"]}],
                "loss_weight": weight if i in weighted else 0.0,
            }
            for i, message in enumerate(conversation.messages)
        ]
        yield {"messages": messages, "loss_multiplier": weight, "sample_id": name}


def messages_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with one line, or None."""
    name = f"sample {row['sample_id']!r}"
    weights = np.asarray([message["loss_weight"] for message in row["messages"]], dtype=np.float64)
    roles = [message["role"] for message in row["messages"]]
    if any(weight and role != "assistant" for weight, role in zip(weights, roles, strict=True)):
        return f"{name}: a message that is no answer has a weight"
    if set(weights.tolist()) - {0.0, row["loss_multiplier"]}:
        return f"{name}: messages have other weights than loss_multiplier"
    if ((weights > 0) & (weights <= LEAST_WEIGHT)).any():
        return f"{name}: a weight is no more than {LEAST_WEIGHT:g}, so that LLaMA-Factory takes the answer for a prompt"
    return weights_fault(name, weights, len(weights))
