"""What a chat template puts around an assistant turn, found by rendering one exchange of known texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from pear_data.chat.control_text import alternation, common_prefix
from pear_data.chat.messages import Conversation, Message
from pear_data.chat.template import ChatTemplate
from pear_data.errors import SampleError, UsageError

_QUESTION, _ANSWER, _MORE = "Question0", "Answer1", "Question2"
WAY_OUT = "pass a template made for this data with --chat-template FILE"


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """Texts of a tokenizer's added tokens, those parsed as control tokens (`special`) apart."""

    special: frozenset[str]
    other: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        """Both kinds."""
        return self.special | self.other


class TurnFrame:
    """The fixed text around assistant turns.

    as_parts       contents go in as lists of text parts (templates of vision models), not as strings
    prompts        the template honours `add_generation_prompt`
    opening        the generation prompt's own text, empty where there is none
    lead           what the template writes between the generation prompt and an answer (gpt-oss: the channel)
    end            the end-of-turn text: the first run of added tokens behind the answer, or, on a tokenizer
                   that has no such tokens, the plain text there
    end_in_next    the template closes a turn with the next message's role marker alone (GLM): that marker
                   is what the policy emits to stop

    Raises UsageError for a template that cannot render an exchange of a user and an assistant, has no end of
    turn, or writes a header before the answer that no generation prompt holds.
    """

    def __init__(self, template: ChatTemplate, tokens: AddedTokens) -> None:
        self.template = template
        self._run = re.compile(f"(?:{alternation(tokens.all)})+")
        self._first = re.compile(alternation(tokens.all))
        self.as_parts, answered = self._exchange()
        asked = self._render(1)
        prompted = self._render(1, generation_prompt=True)
        self.prompts = prompted != asked
        self.opening = prompted[self._whole_tokens(prompted, len(common_prefix([asked, prompted]))) :]
        self.lead = self._between(prompted, answered)
        if not (self.prompts or template.has_marks):
            self._check_no_header(asked, answered)
        self.end, self.end_in_next = self._find_end(answered)

    @property
    def control_texts(self) -> frozenset[str]:
        """Added tokens that frame a turn: control text even on a tokenizer that does not call them special."""
        return frozenset(self._first.findall(self.end) + self._first.findall(self.opening)[:1])

    def marker_at(self, text: str, position: int) -> str:
        """The added token that `text` has at `position`, empty where there is none."""
        marker = self._first.match(text, position)
        return marker.group() if marker else ""

    def closing_marker(self, *, after_tool_calls: bool) -> str:
        """The next message's role marker where `end_in_next`; empty where the template does not show it."""
        return self._marker_after_tool_calls if after_tool_calls else self.end

    @cached_property
    def _marker_after_tool_calls(self) -> str:
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
        messages: list[Message] = [
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "f", "content": _MORE},
        ]
        try:
            called, answered = (self.template.render(Conversation(messages[:n])).text for n in (2, 3))
        except SampleError:
            return ""
        return self.marker_at(answered, len(called)) if answered.startswith(called) else ""

    def _whole_tokens(self, text: str, position: int) -> int:
        """`position`, or where the added token that it lies inside of begins."""
        spans = (match.span() for match in self._first.finditer(text))
        return next((start for start, end in spans if start < position < end), position)

    def _exchange(self) -> tuple[bool, str]:
        for as_parts in (False, True):
            self.as_parts = as_parts
            try:
                text = self._render(2)
            except SampleError as error:
                reason = str(error)
            else:
                if _QUESTION in text and _ANSWER in text:
                    return as_parts, text
                reason = "the chat template leaves out the text of a message"
        raise UsageError(f"a question and an answer: {reason}; {WAY_OUT}")

    def _render(self, count: int, *, generation_prompt: bool = False) -> str:
        texts = (_QUESTION, _ANSWER, _MORE)[:count]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.as_parts else text}
            for role, text in zip(("user", "assistant", "user"), texts, strict=False)
        ]
        return self.template.render(Conversation(messages), generation_prompt=generation_prompt).text

    def _check_no_header(self, asked: str, answered: str) -> None:
        header = self._between(asked, answered)
        if header.strip():
            raise UsageError(
                f"the chat template ignores add_generation_prompt and opens an assistant turn with {header!r}: "
                f"where the policy starts is unknown; {WAY_OUT}"
            )

    def _between(self, before: str, answered: str) -> str:
        return answered[len(before) : answered.index(_ANSWER)] if answered.startswith(before) else ""

    def _find_end(self, answered: str) -> tuple[str, bool]:
        behind = answered[answered.rindex(_ANSWER) + len(_ANSWER) :]
        between = self._between_turns()
        # What stands behind the answer only at the end of a conversation (phi's eos) is no end of turn.
        for text in (common_prefix([behind, between]), behind):
            if run := self._run.search(text):
                return run.group(), False
        if behind.strip():
            return behind.strip(), False
        if between.startswith(behind) and (marker := self.marker_at(between, len(behind))):
            return marker, True
        raise UsageError(f"the chat template ends assistant turns without an end-of-turn token; {WAY_OUT}")

    def _between_turns(self) -> str:
        try:
            followed = self._render(3)
        except SampleError:
            return ""
        return followed.partition(_ANSWER)[2].partition(_MORE)[0]
