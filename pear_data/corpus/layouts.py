"""Which fields of a row are its prompt and response: layouts recognised by name, in an order of precedence.

    input_ids + loss_mask | labels    tokenized already (labels: -100 where not scored)
    messages                          turns with role and content (or from and value)
    conversations                     turns with from and value (or role and content)
    prompt + completion               strings, or lists of turns
    instruction (+ input) + output    strings
    problem + solution                strings

The first that a row fits is an input's layout; a row that does not fit its input's layout is rejected. Fields
named by the user come before all of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pear_data.chat.messages import Conversation
from pear_data.corpus import turns
from pear_data.errors import SampleError
from pear_data.tokens import IntArray

Fields = dict[str, Any]
Mask = npt.NDArray[np.bool_]
IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sample that came tokenized. `scored_first`: its first token was marked as scored, which none can be."""

    input_ids: IntArray
    loss_mask: Mask
    scored_first: bool


Content = Conversation | Tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """`content` makes a row's fields into a sample's content, or raises SampleError with what does not fit.

    `stored` are fields that the corpus holds in columns of its own, left out of a sample's record. `paired` rows are
    a prompt and a response, which make sense without a chat template.
    """

    name: str
    fits: Callable[[Fields], bool]
    content: Callable[[Fields], Content]
    stored: tuple[str, ...] = ()
    paired: bool = False


def pair_layout(prompt: str, response: str) -> Layout:
    """A layout of two fields, each a string or a list of turns."""
    return Layout(
        f"{prompt}+{response}",
        lambda fields: _is_side(fields.get(prompt)) and _is_side(fields.get(response)),
        lambda fields: _pair(fields, prompt, response),
        paired=True,
    )


def recognised(fields: Fields) -> list[Layout]:
    """The layouts a row fits; the first is the one to take."""
    return [layout for layout in LAYOUTS if layout.fits(fields)]


def _is_side(value: Any) -> bool:
    return isinstance(value, str) or turns.is_turns(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | np.ndarray)


def _required(fields: Fields, name: str) -> Any:
    value = fields.get(name)
    if value is None:
        raise SampleError(f"field {name!r} is missing or null")
    return value


def _string(fields: Fields, name: str) -> str:
    value = _required(fields, name)
    if not isinstance(value, str):
        raise SampleError(f"field {name!r} is not a string")
    return value


def _turns_layout(field: str) -> Layout:
    def content(fields: Fields) -> Conversation:
        return turns.conversation(fields, turns.messages(_required(fields, field), field))

    return Layout(field, lambda fields: turns.is_turns(fields.get(field)), content)


def _pair(fields: Fields, prompt: str, response: str) -> Conversation:
    before = _side(fields, prompt, turns.user)
    return turns.conversation(fields, before + _side(fields, response, turns.assistant), len(before))


def _side(fields: Fields, name: str, turn: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """One side of a pair: its list of turns, or its text as one turn."""
    value = _required(fields, name)
    if isinstance(value, str):
        return [turn(value)]
    if not isinstance(value, list):
        raise SampleError(f"field {name!r} is neither a string nor a list of turns")
    return turns.messages(value, name)


def _instruction(fields: Fields) -> Conversation:
    asked, answered = _string(fields, "instruction"), _string(fields, "output")
    if fields.get("input") is not None:
        given = _string(fields, "input")
        asked = f"{asked}\n{given}" if given else asked
    return turns.conversation(fields, [turns.user(asked), turns.assistant(answered)])


def _tokens_layout(scored: str, mask_of: Callable[[Fields, IntArray], Mask]) -> Layout:
    def content(fields: Fields) -> Tokens:
        ids = _integers(fields, "input_ids")
        mask = mask_of(fields, ids)
        if fields.get("attention_mask") is not None and not _mask(fields, "attention_mask", ids).all():
            raise SampleError("attention_mask has zeros: take the padding out")
        first = bool(mask[:1].any())
        mask[:1] = False
        if not mask.any():
            raise SampleError("no scored tokens" + " behind the first, which nothing precedes" * first)
        return Tokens(ids, mask, first)

    return Layout(
        f"input_ids+{scored}",
        lambda fields: _is_list(fields.get("input_ids")) and _is_list(fields.get(scored)),
        content,
        stored=("input_ids", "loss_mask", "labels", "attention_mask"),
    )


def _labelled(fields: Fields, ids: IntArray) -> Mask:
    labels = _integers(fields, "labels")
    _check_length(labels, ids, "labels")
    mask: Mask = labels != IGNORED_LABEL
    if (wrong := np.flatnonzero(mask & (labels != ids))).size:
        raise SampleError(
            f"labels and input_ids differ at position {wrong[0]}: where not -100 they must be the same, unshifted"
        )
    return mask


def _numbers(fields: Fields, name: str, kinds: tuple[type, ...]) -> npt.NDArray[Any]:
    """A field's list of numbers as an array; numpy alone would let a list mix booleans, floats and integers."""
    value = _required(fields, name)
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, list) or not set(map(type, value)).issubset(kinds):
        raise SampleError(f"field {name!r} is not a list of {'flags' if bool in kinds else 'integers'}")
    return np.array(value)


def _integers(fields: Fields, name: str) -> IntArray:
    values = _numbers(fields, name, (int,))
    if len(values) and values.dtype.kind not in "iu":
        raise SampleError(f"field {name!r} holds numbers that are no 64-bit integers")
    return values.astype(np.int64)


def _mask(fields: Fields, name: str, ids: IntArray) -> Mask:
    values = _numbers(fields, name, (int, bool))
    _check_length(values, ids, name)
    mask: Mask = values == 1
    if not (mask | (values == 0)).all():
        raise SampleError(f"field {name!r} holds something else than 0, 1, true and false")
    return mask


def _check_length(values: npt.NDArray[Any], ids: IntArray, name: str) -> None:
    if len(values) != len(ids):
        raise SampleError(f"{name} has {len(values)} elements for {len(ids)} input_ids")


LAYOUTS = (
    _tokens_layout("loss_mask", lambda fields, ids: _mask(fields, "loss_mask", ids)),
    _tokens_layout("labels", _labelled),
    _turns_layout("messages"),
    _turns_layout("conversations"),
    pair_layout("prompt", "completion"),
    Layout(
        "instruction+output",
        lambda fields: isinstance(fields.get("instruction"), str) and isinstance(fields.get("output"), str),
        _instruction,
        paired=True,
    ),
    pair_layout("problem", "solution"),
)
