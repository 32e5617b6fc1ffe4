"""Where an assistant turn ends."""

from __future__ import annotations

from pear_data.chat.frame import AddedTokens, TurnFrame
from pear_data.chat.template import Span


class EndOfTurn:
    """Finds the end of the end-of-turn token of a rendering's last assistant turn."""

    def __init__(self, frame: TurnFrame, tokens: AddedTokens) -> None:
        self._frame = frame
        self._special = tokens.special
        self._added = tokens.all
        self._lengths = sorted({len(token) for token in self._added}, reverse=True)

    def find(self, text: str, start: int) -> tuple[int, int, int] | None:
        """Where the closing of `text`'s last turn begins, and where its stop token begins and ends.

        The turn starts at `start`. Other added tokens (`</tool_call>`) may stand in the closing before the stop token.

        None where the turn has no such token. Only what stands behind the turn's texts is looked at: added
        tokens and white space. There the template's usual end counts first; a turn that ends otherwise (a tool
        call's `<|call|>` or `<|eom_id|>`) ends with its first control token, since what may follow
        it (gemma 4's `<|tool_response>`) opens the tool's answer.
        """
        if self._frame.end_in_next:
            return len(text), len(text), len(text)
        closing = self._closing_tokens(text, start)
        if not closing:
            stripped = len(text.rstrip())
            ends = text.endswith(self._frame.end, start, stripped)
            stop = stripped - len(self._frame.end)
            return (stop, stop, stripped) if ends else None
        begin = closing[0][0]
        usual = text.find(self._frame.end, begin)
        if usual >= 0:
            return begin, usual, usual + len(self._frame.end)
        return next(((begin, s, e) for s, e in closing if text[s:e] in self._special), None)

    def _closing_tokens(self, text: str, start: int) -> list[Span]:
        """The added tokens behind the last other text of `text[start:]`, in order."""
        found: list[Span] = []
        end = len(text)
        while True:
            end = start + len(text[start:end].rstrip())
            length = next((n for n in self._lengths if text[max(start, end - n) : end] in self._added), 0)
            if not length:
                return found[::-1]
            found.append((end - length, end))
            end -= length
