"""Conversations, and the texts of their messages that a rendering has to contain."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pear_data.errors import SampleError

Message = Mapping[str, Any]

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_THINK_TAG = re.compile(r"</?think>")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as `apply_chat_template` takes them, and the JSON schemas of the tools offered in them.

    The first `prompt_length` messages are given: no turn of theirs is scored.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    prompt_length: int = 0

    def through(self, index: int) -> Conversation:
        """The conversation up to and including message `index`."""
        return replace(self, messages=self.messages[: index + 1])

    @property
    def assistant_indices(self) -> list[int]:
        """Where the assistant's messages are, behind the prompt."""
        behind = range(self.prompt_length, len(self.messages))
        return [i for i in behind if self.messages[i]["role"] == "assistant"]


def checked(conversation: Conversation) -> Conversation:
    """The conversation itself, with no tools as None; raises SampleError where it is no list of messages."""
    if not conversation.messages:
        raise SampleError("the conversation has no messages")
    for number, message in enumerate(conversation.messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise SampleError(f"message {number} has no role: each message needs 'role' and 'content'")
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, Mapping) and part.get("type", "text") != "text":
                raise SampleError(
                    f"message {number} holds a part of type {part['type']!r}: only text can be scored"
                )
    if not conversation.assistant_indices:
        raise SampleError("the conversation has no assistant turn: there is nothing to score")
    return replace(conversation, tools=conversation.tools or None)


def with_content(conversation: Conversation, *, as_parts: bool) -> Conversation:
    """Contents in the one form the template reads: lists of text parts, or strings.

    A list of several parts stays a list for a template of strings: how to join them is not ours to guess.
    """

    def shaped(message: Message) -> Message:
        content = message.get("content")
        if as_parts and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        if not as_parts and isinstance(content, list) and len(content) == 1 and message["role"] != "tool":
            return {**message, "content": _part_text(content[0])}
        return message

    return replace(conversation, messages=[shaped(message) for message in conversation.messages])


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it, keys included, replaced by `change` of it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change) for item in value]
    return value


def strings(value: Any) -> Iterator[str]:
    """Every string in `value`, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def turn_pieces(message: Message) -> list[str]:
    """Texts an assistant turn must show, in this order: its reasoning, then its content around think tags."""
    texts = [message[field] for field in REASONING_FIELDS if isinstance(message.get(field), str)][:1]
    for text in _content_texts(message):
        texts.extend(_THINK_TAG.split(text))
    return [text.strip() for text in texts if text.strip()]


def tool_call_names(message: Message) -> list[str]:
    """The functions an assistant turn calls, in order."""
    calls = message.get("tool_calls") or ()
    return [call.get("function", call).get("name", "") for call in calls if isinstance(call, Mapping)]


def tool_names(conversation: Conversation) -> list[str]:
    """The functions the conversation offers."""
    tools = [tool for tool in conversation.tools or () if isinstance(tool, Mapping)]
    return [tool.get("function", tool).get("name", "") for tool in tools]


def message_text(message: Message) -> str:
    """The content of a message as one string."""
    return "".join(_content_texts(message))


def shows(text: str, message: Message) -> bool:
    """Whether `text` holds the content of a message that is not the assistant's, plain or as JSON."""

    def shown(piece: str) -> bool:
        forms = (piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1])
        return any(form in text for form in forms)

    return all(shown(piece.strip()) for piece in _content_texts(message))


def _content_texts(message: Message) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        return [_part_text(part) for part in content]
    return []


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else ""
