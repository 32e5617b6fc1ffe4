"""Spans from a template's generation marks, brought to the rule of scored tokens."""

from __future__ import annotations

from collections.abc import Sequence

from pear_data.chat.frame import WAY_OUT, TurnFrame
from pear_data.chat.template import Span
from pear_data.errors import UsageError


def marked(
    text: str, turn: Span, closing: int, marks: Sequence[Span], pieces: Sequence[Span], frame: TurnFrame
) -> tuple[list[Span], bool]:
    """The marks inside one turn: less its generation prompt and less what follows its end-of-turn token.

    `turn` reaches from behind the one to behind the other, its closing tokens start at `closing`. Marks that reach
    these but not the end-of-turn token are extended over it, since the policy has to emit it; the flag says so.
    Touching marks become one span; a turn without marks has none.

    Raises UsageError where a mark cuts through one of the turn's texts (`pieces`) or through a closing token: the
    marks are then not where the template renders them.
    """
    start, end = turn
    spans: list[Span] = []
    for s, e in sorted((max(s, start), min(e, end)) for s, e in marks):
        if spans and s < e and s <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(e, spans[-1][1]))
        elif s < e:
            spans.append((s, e))
    for piece in pieces:
        inside = sum(max(0, min(piece[1], e) - max(piece[0], s)) for s, e in spans)
        if 0 < inside < piece[1] - piece[0]:
            raise _misplaced(text[slice(*piece)])
    if not spans or spans[-1][1] == end or text[spans[-1][1] : closing].strip():
        return spans, False
    if spans[-1][1] > closing and not frame.marker_at(text, spans[-1][1]):
        raise _misplaced(text[closing:end])
    spans[-1] = (spans[-1][0], end)
    return spans, True


def _misplaced(text: str) -> UsageError:
    return UsageError(
        f"the generation marks of the chat template cut through {text[:40]!r} (marks inside a macro are counted from "
        f"its start): take the marks out, or put them outside of macros, and {WAY_OUT}"
    )
