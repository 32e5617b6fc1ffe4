"""The scored text of each assistant turn under one chat template, and what corresponds to it under another's.

A turn is a body (what stands between the generation prompt and the end of the turn) and its end-of-turn text. Ends of
turns stand for each other whatever they are called. Bodies must be the same text, but for what a template writes of its
own accord: its lead in front of every answer, white space and think tags around a text. Those of the one template stand
for those of the other.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pear_data.chat.control_text import common_prefix, put_back
from pear_data.chat.messages import REASONING_FIELDS, Message, message_text
from pear_data.chat.spans import ScoredText
from pear_data.chat.token_bytes import Ids, Lengths, TokenBytes
from pear_data.errors import SampleError

Piece = tuple[int, int, bool]  # bytes in one text, bytes in the other, whether they are the same

_THINK, _THINK_END = "<think>", "</think>"
_LOOK_BACK = 64  # characters of a generation prompt, which ends in a think tag where it has one
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class TurnText:
    """What is scored of one assistant turn.

    `message` is the one whose turn it is, `before` what stands in front, `lead` what the template writes in front of
    every answer, as part of the body.
    """

    message: int
    before: str
    body: str
    closing: str
    lead: str = ""


def turn_texts(text: ScoredText, tokens: TokenBytes) -> list[TurnText]:
    """The turns of a rendered sample, in order. Raises SampleError where the first of its tokens cannot be scored."""
    turns: list[TurnText] = []
    for (start, end), (message, stop) in zip(text.spans, text.turns, strict=True):
        if start == 0 and not text.ids_before:
            raise SampleError("the scored text's first token has nothing before it and is left unscored")
        body = put_back(text.text[start : min(end, stop)], text.hidden)
        closing = put_back(text.text[max(start, stop) : end], text.hidden)
        if turns and turns[-1].message == message:
            last = turns.pop()
            turns.append(replace(last, body=last.body + body, closing=last.closing + closing))
        else:
            before = text.text[max(0, start - _LOOK_BACK) : start]
            turns.append(TurnText(message, before, body, closing, text.lead))
    if text.ids_behind:
        last = turns.pop()
        turns.append(replace(last, closing=last.closing + tokens.text(text.ids_behind).decode()))
    return turns


def as_read(
    turns: Sequence[TurnText], tokens: TokenBytes, ids: Ids, previous: Ids
) -> tuple[list[TurnText], Lengths]:
    """The turns as the tokens spell them (in Unicode's composed form, where the tokenizer has it), and each token's
    bytes of them. `ids` are the scored tokens, `previous` the tokens before each.

    Raises SampleError where the tokens spell another text.
    """
    for lengths_of in (tokens.lengths, lambda ids: tokens.without_added_spaces(ids, previous)):
        lengths = lengths_of(ids)
        spelled = tokens.joined(ids, lengths).tobytes()
        if spelled == _whole(turns):
            return list(turns), lengths
        composed = [_composed(turn) for turn in turns]
        if spelled == _whole(composed):
            return composed, lengths
    raise SampleError("the tokens do not spell the text they were made from: its tokenizer changes texts")


def corresponding(
    first: Sequence[TurnText], second: Sequence[TurnText], messages: Sequence[Message]
) -> list[Piece]:
    """The pieces of the scored text under two templates, side by side.

    Raises SampleError where the templates make different texts of a turn, or do not score the same turns.
    """
    if [turn.message for turn in first] != [turn.message for turn in second]:
        raise SampleError("the two chat templates do not score the same assistant turns")
    pieces: list[Piece] = []
    for one, other in zip(first, second, strict=True):
        pieces += _bodies(one, other, messages[one.message])
        if not (one.closing and other.closing):
            raise SampleError(f"one chat template scores no end of the turn of message {one.message + 1}")
        pieces.append(_piece(one.closing, other.closing))
    return pieces


def _bodies(one: TurnText, other: TurnText, message: Message) -> list[Piece]:
    if one.body == other.body:
        return [_piece(one.body, other.body)]
    own_lead, body = _without_lead(one)
    others_lead, other_body = _without_lead(other)
    lead, core, tail = _parted(body)
    other_lead, other_core, other_tail = _parted(other_body)
    if core != other_core:
        raise SampleError(_different(one, core, other_core))
    before, after = _common_end(lead, other_lead), common_prefix([tail, other_tail])
    own_front, own_back = _own_edges(message)
    thinks_alike = _with_thinking(one.before, lead) == _with_thinking(other.before, other_lead)
    if lead != other_lead and not (before.endswith(own_front) or thinks_alike):
        raise SampleError(_different(one, lead, other_lead))
    if tail != other_tail and not after.startswith(own_back):
        raise SampleError(_different(one, tail, other_tail))
    text = before + core + after
    return [
        _piece(own_lead, others_lead),
        _piece(lead.removesuffix(before), other_lead.removesuffix(before)),
        _piece(text, text),
        _piece(tail.removeprefix(after), other_tail.removeprefix(after)),
    ]


def _common_end(one: str, other: str) -> str:
    return common_prefix([one[::-1], other[::-1]])[::-1]


def _piece(one: str, other: str) -> Piece:
    return len(one.encode()), len(other.encode()), one == other


def _without_lead(turn: TurnText) -> tuple[str, str]:
    """The template's lead and the rest of the body; a lead of white space and think tags stays with the body."""
    cut = len(turn.lead) if _parted(turn.lead)[1] and turn.body.startswith(turn.lead) else 0
    return turn.body[:cut], turn.body[cut:]


def _parted(body: str) -> tuple[str, str, str]:
    """White space and think tags in front, the text itself, white space and think tags behind."""
    core = body
    while (shorter := core.lstrip().removeprefix(_THINK).removeprefix(_THINK_END)) != core:
        core = shorter
    lead = body[: len(body) - len(core)]
    behind = core
    while (shorter := core.rstrip().removesuffix(_THINK).removesuffix(_THINK_END)) != core:
        core = shorter
    return lead, core, behind[len(core) :]


def _own_edges(message: Message) -> tuple[str, str]:
    """The white space and think tags that a message itself brings to the front and to the back of its turn."""
    fields: Iterable[object] = (*(message.get(field) for field in REASONING_FIELDS), message_text(message))
    texts = [text for text in fields if isinstance(text, str) and text] or [""]
    return _parted(texts[0])[0], _parted(texts[-1])[2]


def _with_thinking(before: str, lead: str) -> str:
    """`lead` from its think tag on, the tag being the generation prompt's where the template puts it there."""
    framing = _parted(before)[2] + lead
    start = framing.find(_THINK)
    return framing[start:] if start >= 0 else lead


def _whole(turns: Iterable[TurnText]) -> bytes:
    return "".join(turn.body + turn.closing for turn in turns).encode()


def _composed(turn: TurnText) -> TurnText:
    return replace(turn, body=unicodedata.normalize("NFC", turn.body))


def _different(turn: TurnText, one: str, other: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return (
        f"the two policies read different texts in message {turn.message + 1}, "
        f"{one[at : at + _SHOWN]!r} and {other[at : at + _SHOWN]!r} from character {at + 1} on"
    )
