"""Turns as corpora spell them (OpenAI's role/content, ShareGPT's from/value) as messages for a chat template."""

from __future__ import annotations

from typing import Any

from pear_data.chat.messages import REASONING_FIELDS, Conversation
from pear_data.corpus.records import parse_json, shown
from pear_data.errors import SampleError

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_CALLS = "function_call"  # ShareGPT's assistant turn whose value is the JSON of its calls


def user(content: str) -> dict[str, Any]:
    """A user turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    """An assistant turn."""
    return {"role": "assistant", "content": content}


def is_turns(value: Any) -> bool:
    """Whether a field looks like a list of turns (or its JSON)."""
    turns = value[:1] if isinstance(value, list) else value
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = parse_json(turns)
        except SampleError:
            return False
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict)


def conversation(fields: dict[str, Any], turns: list[dict[str, Any]], prompt_length: int = 0) -> Conversation:
    """The turns of a row with what else belongs to them: its `tools`, and a `system` prompt of its own.

    The first `prompt_length` turns are given and not scored.

    Raises:
        SampleError: `tools` is no list of objects, or an earlier `history` is given that has no place here.
    """
    if not _is_empty(fields.get("history")):
        raise SampleError("has earlier turns in 'history': give the row as messages")
    system = fields.get("system")
    if system is not None and not isinstance(system, str):
        raise SampleError("'system' is not a string")
    if system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
        prompt_length += prompt_length > 0
    offered = fields.get("tools")
    tools = [] if _is_empty(offered) else [_parsed(tool, "tools") for tool in _listed(offered, "tools")]
    if not all(isinstance(tool, dict) for tool in tools):
        raise SampleError("'tools' is not a list of objects")
    return Conversation(turns, tools or None, prompt_length)


def messages(value: Any, field: str) -> list[dict[str, Any]]:
    """A field's turns as messages.

    Raises:
        SampleError: it is no list of turns, or one of them has an unknown role or no text.
    """
    turns = _listed(value, field)
    if not turns:
        raise SampleError(f"{field!r} holds no turns")
    return [_message(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]


def _message(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise SampleError(f"{place} is not an object")
    speaker, said = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    role, content = turn.get(speaker), turn.get(said)
    if role == _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, place)}
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(f"{place} has the unknown {speaker} {shown(role)}")
    message = {key: item for key, item in turn.items() if key not in (speaker, said)}
    message = {"role": _ROLES[role], "content": content, **message}
    if turn.get("tool_calls"):
        message["tool_calls"] = _calls(turn["tool_calls"], place)
    if content is None:
        if not any(message.get(field) for field in ("tool_calls", *REASONING_FIELDS)):
            raise SampleError(f"{place} has no {said!r}")
        message["content"] = ""
    elif not isinstance(content, str) and not _is_parts(content):
        raise SampleError(f"{said!r} of {place} is neither a string nor a list of text parts")
    return message


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) for part in content)


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: templates write those out as JSON, and a string of JSON would
    be quoted once more (vLLM does the same to what its chat API receives)."""
    value = _parsed(value, f"tool calls of {place}")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise SampleError(f"a tool call of {place} has no function name")
        arguments = _parsed(function.get("arguments", {}), f"arguments of a tool call of {place}")
        if not isinstance(arguments, dict):
            raise SampleError(f"arguments of a tool call of {place} are not an object")
        outer = {key: item for key, item in call.items() if key != "function"} if function is not call else {}
        calls.append({"type": "function", **outer, "function": {**function, "arguments": arguments}})
    return calls


def _is_empty(value: Any) -> bool:
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def _listed(value: Any, field: str) -> list[Any]:
    value = _parsed(value, field)
    if not isinstance(value, list):
        raise SampleError(f"{field!r} is not a list")
    return value


def _parsed(value: Any, what: str) -> Any:
    """The value, read from JSON where it is a string."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except SampleError as error:
        raise SampleError(f"{what}: {error}") from None
