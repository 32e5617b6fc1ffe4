from __future__ import annotations

import pytest

from pear_data.corpus.turns import messages
from pear_data.errors import SampleError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": "a"}, {"role": "user", "content": "a"}),
        ({"from": "human", "value": "a"}, {"role": "user", "content": "a"}),
        ({"from": "user", "value": "a"}, {"role": "user", "content": "a"}),
        ({"from": "gpt", "value": "a"}, {"role": "assistant", "content": "a"}),
        ({"from": "system", "value": "a"}, {"role": "system", "content": "a"}),
        ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
        ({"from": "tool", "value": "a"}, {"role": "tool", "content": "a"}),
        ({"role": "developer", "content": "a"}, {"role": "developer", "content": "a"}),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "r", "name": "n"},
            {"role": "assistant", "content": "a", "reasoning_content": "r", "name": "n"},
        ),
        (
            {"role": "assistant", "content": None, "reasoning_content": "r"},
            {"role": "assistant", "content": "", "reasoning_content": "r"},
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                ],
            },
            {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]},
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
    ],
    ids=range(14),
)
def test_a_turn_becomes_a_message(turn, message):
    assert messages([turn], "messages") == [message]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ("text", "turn 2 is not an object"),
        ({"content": "a"}, "turn 2 has the unknown role None"),
        ({"role": "narrator", "content": "a"}, "turn 2 has the unknown role 'narrator'"),
        ({"from": "x\n\x1b[2J", "value": "a"}, "turn 2 has the unknown from 'x\\n\\x1b[2J'"),
        ({"role": ["user"], "content": "a"}, "turn 2 has the unknown role ['user']"),
        ({"role": "user"}, "turn 2 has no 'content'"),
        ({"from": "gpt", "value": None}, "turn 2 has no 'value'"),
        ({"role": "user", "content": 3}, "'content' of turn 2 is neither a string nor a list of text parts"),
        (
            {"role": "user", "content": ["a"]},
            "'content' of turn 2 is neither a string nor a list of text parts",
        ),
        (
            {"from": "function_call", "value": "f(x=1)"},
            "tool calls of turn 2: not JSON: Expecting value at character 1",
        ),
        ({"from": "function_call", "value": "[3]"}, "a tool call of turn 2 has no function name"),
        (
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}],
            },
            "arguments of a tool call of turn 2 are not an object",
        ),
        (
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
            },
            "arguments of a tool call of turn 2: not JSON: Expecting property name enclosed in double quotes at "
            "character 2",
        ),
    ],
    ids=range(13),
)
def test_a_turn_that_is_none(turn, reason):
    with pytest.raises(SampleError) as caught:
        messages([{"role": "user", "content": "a"}, turn], "messages")
    assert str(caught.value) == reason
