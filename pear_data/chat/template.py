"""Rendering conversations with a chat template, through transformers' own sandboxed machinery."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from pear_data.chat.messages import Conversation
from pear_data.errors import SampleError, UsageError

Span = tuple[int, int]  # characters [start, end) of a text

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the expression transformers itself looks for
_DATE_FUNCTION = "strftime_now"  # what a template calls to write the date
_THINKING_VARIABLES = (
    "enable_thinking",
    "thinking",
)  # as Qwen, GLM, Nemotron and as DeepSeek, Granite call it


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation and, where the template has them, its generation marks."""

    text: str
    marks: tuple[Span, ...]


def read_template(path: Path) -> str:
    """The text of a chat template's file; raises UsageError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the chat template {path} ({error}): give a Jinja file, or 'none' for raw text"
        ) from None


class ChatTemplate:
    """A Jinja chat template with the variables the tokenizer gives it (its special tokens by name).

    To a template that writes the date, it is `today`, whatever the clock says. Raises UsageError where the template
    is not valid Jinja.
    """

    def __init__(self, text: str, variables: Mapping[str, str], today: date | None = None) -> None:
        self.text = text
        self.has_marks = _GENERATION.search(text) is not None
        self.writes_date = _DATE_FUNCTION in text
        self._variables: dict[str, Any] = dict(variables)
        if self.writes_date:
            # A variable goes before the environment's function of that name, which asks the clock at every rendering.
            self._variables[_DATE_FUNCTION] = (today or date.today()).strftime
        try:
            # An empty list of conversations compiles the template and renders nothing.
            render_jinja_template([], chat_template=text)
        except TemplateError as error:
            raise UsageError(
                f"the chat template is not valid Jinja: {error} (line {getattr(error, 'lineno', '?')}); "
                "pass a working one with --chat-template FILE"
            ) from error

    def render(
        self, conversation: Conversation, *, generation_prompt: bool = False, thinking: bool | None = None
    ) -> Rendering:
        """The conversation as text; raises SampleError where the template refuses it.

        `thinking` sets the template's mode where it has one; None leaves its default.
        """
        modes = {} if thinking is None else dict.fromkeys(_THINKING_VARIABLES, thinking)
        try:
            texts, marks = render_jinja_template(
                [list(conversation.messages)],
                tools=conversation.tools and list(conversation.tools),
                chat_template=self.text,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=self.has_marks,
                **self._variables,
                **modes,
            )
        # A template is a program of its author's: it can raise anything on a conversation it was not made for.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise SampleError(f"the chat template cannot render the conversation: {reason}") from error
        return Rendering(texts[0], tuple(marks[0]) if marks else ())
