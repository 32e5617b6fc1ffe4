"""Spans from a template's generation marks, brought to the rule of scored tokens."""

from __future__ import annotations

from collections.abc import Sequence

from pear_data.corpus.template import Span
from pear_data.corpus.template_frame import WAY_OUT
from pear_data.errors import UsageError


def marked(
    text: str, start: int, closing: int, end: int, marks: Sequence[Span], pieces: Sequence[Span]
) -> tuple[list[Span], bool]:
    """The marks of one turn, less its generation prompt (before `start`) and what follows its end (`end`).

    Marks that reach the turn's closing tokens (from `closing` on) but not its end-of-turn token are extended
    over it, since the policy has to emit it; the flag says so. Touching marks become one span; a turn without
    marks has none. Raises UsageError where a mark cuts through one of the turn's texts (`pieces`): the marks are
    then not where the template renders them.
    """
    spans: list[Span] = []
    for s, e in sorted((max(s, start), min(e, end)) for s, e in marks):
        if spans and s < e and s <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(e, spans[-1][1]))
        elif s < e:
            spans.append((s, e))
    for s, e in pieces:
        inside = sum(max(0, min(e, span_end) - max(s, span_start)) for span_start, span_end in spans)
        if 0 < inside < e - s:
            raise UsageError(
                f"the generation marks of the chat template cut through the text {text[s:e][:40]!r} (marks inside "
                f"a macro are counted from its start); {WAY_OUT}"
            )
    if not spans or spans[-1][1] == end or text[spans[-1][1] : closing].strip():
        return spans, False
    spans[-1] = (spans[-1][0], end)
    return spans, True
