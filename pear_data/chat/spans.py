"""From a conversation to texts with the character spans that the policy itself would have to emit.

An assistant turn is scored from behind its generation prompt up to and including its end-of-turn token. Where
it starts is known from a rendering of the messages before it with the generation prompt; that the turn goes on
from there, that later messages leave it as it was, and that its texts are in it is checked, never assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pear_data.chat.control_text import Hidden
from pear_data.chat.end_of_turn import EndOfTurn
from pear_data.chat.frame import WAY_OUT, TurnFrame
from pear_data.chat.marks import marked
from pear_data.chat.messages import Conversation, shows, tool_call_names, tool_names, turn_pieces
from pear_data.chat.template import ChatTemplate, Rendering, Span
from pear_data.errors import SampleError, UsageError

Turns = Literal["last", "all"]

EXPANDED = "conversations made into one sample per assistant turn"
LAST_ONLY = "conversations scored in their last assistant turn only"
OTHER_MODE = "assistant turns that go on from the template's generation prompt with thinking switched over"
MARKS_EXTENDED = "assistant turns whose end-of-turn token the generation marks of the template leave out"
MARKER_APPENDED = "last turns closed with the role marker that the template leaves to the next message"


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A rendered sample.

    text, spans               what is tokenized, and the characters of it to score, in order
    turns                     for each span the message it is of, and where the turn's stop token begins
    suffix                    what the sample's id gets appended
    lead                      what the template writes in front of every answer, scored with it
    hidden                    control-token text of messages that the text holds in disguise
    ids_before, ids_behind    tokens around the text; those behind are scored
    """

    text: str
    spans: tuple[Span, ...]
    turns: tuple[tuple[int, int], ...]
    suffix: str = ""
    lead: str = ""
    hidden: Hidden = field(default_factory=dict)
    ids_before: tuple[int, ...] = ()
    ids_behind: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Turn:
    """One assistant turn within the rendering that ends with it."""

    index: int  # of its message
    number: int  # among the assistant turns, from 1
    message: Mapping[str, Any]
    rendering: Rendering  # the conversation through it
    start: int  # where its generation prompt ends
    closing: int  # where the added tokens behind its texts begin
    stop: int  # where its end-of-turn token begins
    end: int  # where its end-of-turn token ends


class SpanFinder:
    """Scored texts of conversations under one template; `notes` counts what had to be decided."""

    def __init__(
        self, template: ChatTemplate, frame: TurnFrame, end_of_turn: EndOfTurn, turns: Turns | None
    ) -> None:
        self._template = template
        self._frame = frame
        self._end_of_turn = end_of_turn
        self._turns = turns
        self.notes: Counter[str] = Counter()

    def scored_texts(self, conversation: Conversation) -> list[ScoredText]:
        """One text per conversation, or one per assistant turn (`turns="all"` on a rewriting template).

        Raises SampleError for a conversation that the template cannot carry, and UsageError where later messages
        change the rendering of an earlier turn and `turns` is not chosen.
        """
        indices = conversation.assistant_indices
        if self._turns == "last":
            self.notes[LAST_ONLY] += len(indices) > 1
            return [self._alone(conversation, self._turn(conversation, len(indices)))]
        whole = self._template.render(conversation)
        turns = [self._turn(conversation, number, whole) for number in range(1, len(indices) + 1)]
        rewritten = next((t for t in turns if not whole.text.startswith(t.rendering.text[: t.end])), None)
        if rewritten is None:
            return [self._together(conversation, turns, whole)]
        if self._turns is None:
            raise UsageError(
                f"the chat template rewrites earlier turns (assistant turn {rewritten.number} reads differently "
                "once later messages follow): choose --turns last to score only the last assistant turn of each "
                "conversation, or --turns all to make one sample of each assistant turn"
            )
        self.notes[EXPANDED] += len(turns) > 1
        return [self._alone(conversation, t, f"#{t.number}" if len(turns) > 1 else "") for t in turns]

    def _turn(self, conversation: Conversation, number: int, whole: Rendering | None = None) -> _Turn:
        index = conversation.assistant_indices[number - 1]
        ends_here = index + 1 == len(conversation.messages)
        rendering = whole if whole and ends_here else self._template.render(conversation.through(index))
        start = self._prompt_end(conversation, index, number, rendering.text)
        closing = self._end_of_turn.find(rendering.text, start)
        if closing is None:
            raise SampleError(
                f"the chat template puts no end-of-turn token behind assistant turn {number}; {WAY_OUT}"
            )
        return _Turn(index, number, conversation.messages[index], rendering, start, *closing)

    def _prompt_end(self, conversation: Conversation, index: int, number: int, text: str) -> int:
        if index == 0:
            return self._opening_end(text)
        before = conversation.through(index - 1)
        prompts = (
            (thinking, self._template.render(before, generation_prompt=True, thinking=thinking).text)
            for thinking in (None, False, True)
        )
        tried = []
        for thinking, prompt in prompts:
            if text.startswith(prompt):
                self.notes[OTHER_MODE] += thinking is not None
                return len(prompt) + self._missing_opening(before, prompt, text)
            tried.append(prompt)
        raise SampleError(
            f"assistant turn {number} does not go on from the template's generation prompt, which ends in "
            f"{tried[0][-24:]!r}; {WAY_OUT}"
        )

    def _missing_opening(self, before: Conversation, prompt: str, text: str) -> int:
        """The length of the generation prompt's own text where the template leaves it to the turn.

        Gemma 4 does so behind a tool's answer. It is no more the policy's to emit there than elsewhere.
        """
        opening = self._frame.opening
        if opening and text.startswith(opening, len(prompt)):
            return len(opening) if self._template.render(before).text == prompt else 0
        return 0

    def _opening_end(self, text: str) -> int:
        # Templates refuse or misrender an empty conversation, so the prompt's own text is looked up instead.
        if self._frame.opening and (start := text.find(self._frame.opening)) >= 0:
            return start + len(self._frame.opening)
        if self._template.has_marks and not self._frame.opening:
            return 0
        raise SampleError(
            "the conversation starts with an assistant turn, and its rendering does not hold the generation prompt "
            f"of the chat template, which would show where the policy starts; {WAY_OUT}"
        )

    def _together(self, conversation: Conversation, turns: list[_Turn], whole: Rendering) -> ScoredText:
        text = whole.text
        spans: list[Span] = []
        of_turns: list[tuple[int, int]] = []
        for turn in turns:
            text, found = self._scored(turn, text, whole.marks)
            spans.extend(found)
            of_turns.extend([(turn.index, turn.stop)] * len(found))
        self._check_context(conversation, text)
        return ScoredText(text, tuple(spans), tuple(of_turns), lead=self._frame.lead)

    def _alone(self, conversation: Conversation, turn: _Turn, suffix: str = "") -> ScoredText:
        text, spans = self._scored(turn, turn.rendering.text, turn.rendering.marks)
        self._check_context(conversation.through(turn.index), text)
        of_turns = ((turn.index, turn.stop),) * len(spans)
        return ScoredText(text, tuple(spans), of_turns, suffix, self._frame.lead)

    def _scored(self, turn: _Turn, text: str, marks: tuple[Span, ...]) -> tuple[str, list[Span]]:
        """The turn's spans in `text`, which is longer afterwards where the stop token had to be added."""
        pieces = self._pieces(turn, text)
        end = turn.end
        if self._frame.end_in_next:
            text, end = self._closed_by_next(turn, text)
        if not self._template.has_marks:
            return text, [(turn.start, end)]
        spans, extended = marked(text, (turn.start, end), turn.closing, marks, pieces, self._frame)
        self.notes[MARKS_EXTENDED] += extended
        return text, spans

    def _closed_by_next(self, turn: _Turn, text: str) -> tuple[str, int]:
        marker = self._frame.marker_at(text, turn.end)
        if not marker and turn.end == len(text):
            marker = self._frame.closing_marker(after_tool_calls=bool(turn.message.get("tool_calls")))
            text += marker
            self.notes[MARKER_APPENDED] += 1
        if not marker:
            raise SampleError(f"no role marker closes assistant turn {turn.number}; {WAY_OUT}")
        return text, turn.end + len(marker)

    def _pieces(self, turn: _Turn, text: str) -> list[Span]:
        """Where the turn's texts are in `text`; raises SampleError where the template left one out."""
        found, position = [], turn.start
        pieces = turn_pieces(turn.message)
        for piece in pieces:
            start = text.find(piece, position, turn.end)
            if start < 0:
                raise SampleError(
                    f"the chat template leaves out text of assistant turn {turn.number} "
                    f"({piece[:40]!r}); {WAY_OUT}"
                )
            position = start + len(piece)
            found.append((start, position))
        calls = Counter(tool_call_names(turn.message))
        for name, count in calls.items():
            in_texts = sum(piece.count(name) for piece in pieces)
            if text.count(name, turn.start, turn.end) < in_texts + count:
                raise SampleError(
                    f"the chat template leaves out the call of {name!r} in assistant turn {turn.number}; {WAY_OUT}"
                )
        return found

    def _check_context(self, conversation: Conversation, text: str) -> None:
        for number, message in enumerate(conversation.messages, 1):
            if message["role"] != "assistant" and not shows(text, message):
                raise SampleError(
                    f"the chat template leaves out text of message {number} ({message['role']}); {WAY_OUT}"
                )
        for name in tool_names(conversation):
            if name not in text:
                raise SampleError(f"the chat template leaves out the tool {name!r}; {WAY_OUT}")
