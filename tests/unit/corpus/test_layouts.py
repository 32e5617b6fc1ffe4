from __future__ import annotations

import numpy as np
import pytest

from pear_data.chat.messages import Conversation
from pear_data.corpus.layouts import LAYOUTS, pair_layout, recognised
from pear_data.errors import SampleError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
TURNS = [USER, ANSWER]
GPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
SYSTEM = {"role": "system", "content": "s"}

CONVERSATIONS = {
    "messages": ("messages", {"messages": TURNS}, TURNS, None),
    "messages as JSON": ("messages", {"messages": '[{"role": "user", "content": "q"}]'}, [USER], None),
    "messages with tools": ("messages", {"messages": TURNS, "tools": TOOLS}, TURNS, TOOLS),
    "messages with tools as JSON": (
        "messages",
        {"messages": TURNS, "tools": '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'},
        TURNS,
        TOOLS,
    ),
    "messages without tools": ("messages", {"messages": TURNS, "tools": []}, TURNS, None),
    "messages with an empty tools string": ("messages", {"messages": TURNS, "tools": ""}, TURNS, None),
    "messages spelt as ShareGPT": ("messages", {"messages": GPT}, TURNS, None),
    "conversations": ("conversations", {"conversations": GPT}, TURNS, None),
    "conversations with a system column": (
        "conversations",
        {"conversations": GPT, "system": "s"},
        [SYSTEM, *TURNS],
        None,
    ),
    "conversations spelt as OpenAI": ("conversations", {"conversations": TURNS}, TURNS, None),
    "prompt and completion": ("prompt+completion", {"prompt": "q", "completion": "a"}, TURNS, None),
    "prompt and completion as turns": (
        "prompt+completion",
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        [SYSTEM, *TURNS],
        None,
    ),
    "prompt as turns, completion as text": (
        "prompt+completion",
        {"prompt": [USER], "completion": "a"},
        TURNS,
        None,
    ),
    "instruction": ("instruction+output", {"instruction": "q", "input": "", "output": "a"}, TURNS, None),
    "instruction and input": (
        "instruction+output",
        {"instruction": "q", "input": "i", "output": "a"},
        [{"role": "user", "content": "q\ni"}, ANSWER],
        None,
    ),
    "instruction with a null input": (
        "instruction+output",
        {"instruction": "q", "input": None, "output": "a"},
        TURNS,
        None,
    ),
    "problem and solution": ("problem+solution", {"problem": "q", "solution": "a", "answer": 3}, TURNS, None),
}


@pytest.mark.parametrize(("name", "fields", "messages", "tools"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_layout_is_recognised_and_read(name, fields, messages, tools):
    layout, *_ = recognised(fields)
    assert layout.name == name
    paired = name in ("prompt+completion", "problem+solution")
    assert layout.content(fields) == Conversation(messages, tools, len(messages) - 1 if paired else 0)


def test_assistant_turns_of_a_prompt_belong_to_the_prompt():
    fields = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER], "system": "s"}
    layout, *_ = recognised(fields)
    conversation = layout.content(fields)
    assert len(conversation.messages) == 7
    assert conversation.assistant_indices == [4, 6]
    assert conversation.through(4).assistant_indices == [4]


def test_the_first_in_order_is_taken():
    fields = {
        "solution": "a",
        "problem": "q",
        "output": "a",
        "instruction": "q",
        "completion": "a",
        "prompt": "q",
        "conversations": GPT,
        "messages": TURNS,
        "labels": [-100, 2],
        "loss_mask": [0, 1],
        "input_ids": [1, 2],
    }
    order = [
        "input_ids+loss_mask",
        "input_ids+labels",
        "messages",
        "conversations",
        "prompt+completion",
        "instruction+output",
        "problem+solution",
    ]
    assert [layout.name for layout in LAYOUTS] == order
    for name in order:
        assert recognised(fields)[0].name == name
        for key in name.split("+")[-1:]:
            del fields[key]
    assert recognised(fields) == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text": "plain"},
        {"input_ids": [1, 2]},
        {"input_ids": "1 2", "loss_mask": [0, 1]},
        {"prompt": "q", "completion": 3},
        {"prompt": [], "completion": "a"},
        {"messages": []},
        {"messages": "not turns"},
        {"messages": "[not json"},
        {"messages": ["a", "b"]},
        {"messages": np.array([1, 2])},
        {"prompt": "q", "completion": None},
        {"instruction": ["q"], "output": "a"},
    ],
    ids=range(13),
)
def test_what_no_layout_fits(fields):
    assert recognised(fields) == []


def test_named_fields():
    layout = pair_layout("question", "r1")
    assert layout.name == "question+r1"
    assert layout.content({"question": "q", "r1": "a", "messages": GPT}) == Conversation(TURNS, None, 1)


def tokens(**fields):
    layout, *_ = recognised(fields)
    return layout.content(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 0]},
        {"input_ids": [5, 6, 7], "loss_mask": [False, True, False]},
        {"input_ids": [5, 6, 7], "loss_mask": [0, True, False], "attention_mask": [1, 1, 1]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]},
        {"input_ids": np.array([5, 6, 7], np.uint16), "loss_mask": np.array([False, True, False])},
        {"input_ids": np.array([5, 6, 7], np.int64), "loss_mask": np.array([0.0, 1.0, 0.0])},
        {"input_ids": np.array([5, 6, 7], np.int32), "labels": np.array([-100, 6, -100], np.int64)},
    ],
    ids=range(7),
)
def test_tokenized_rows(fields):
    sample = tokens(**fields)
    assert sample.input_ids.tolist() == [5, 6, 7]
    assert sample.loss_mask.tolist() == [False, True, False]
    assert sample.loss_mask.dtype == bool
    assert not sample.scored_first


def test_the_first_token_is_never_scored():
    given = np.array([True, True])
    sample = tokens(input_ids=[5, 6], loss_mask=given)
    assert sample.loss_mask.tolist() == [False, True]
    assert sample.scored_first
    assert given.all(), "the row stays as it was"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"input_ids": [1, 2.0], "loss_mask": [0, 1]}, "field 'input_ids' is not a list of integers"),
        ({"input_ids": [1, True], "loss_mask": [0, 1]}, "field 'input_ids' is not a list of integers"),
        ({"input_ids": ["1", "2"], "loss_mask": [0, 1]}, "field 'input_ids' is not a list of integers"),
        ({"input_ids": [[1], [2]], "loss_mask": [0, 1]}, "field 'input_ids' is not a list of integers"),
        (
            {"input_ids": [1, 2**70], "loss_mask": [0, 1]},
            "field 'input_ids' holds numbers that are no 64-bit integers",
        ),
        (
            {"input_ids": np.array([1.0, 2.0]), "loss_mask": [0, 1]},
            "field 'input_ids' holds numbers that are no 64-bit integers",
        ),
        ({"input_ids": [1, 2], "loss_mask": [0, "1"]}, "field 'loss_mask' is not a list of flags"),
        (
            {"input_ids": [1, 2], "loss_mask": [0, 2]},
            "field 'loss_mask' holds something else than 0, 1, true and false",
        ),
        ({"input_ids": [1, 2], "loss_mask": [0]}, "loss_mask has 1 elements for 2 input_ids"),
        ({"input_ids": [1, 2], "labels": [-100, 2, 3]}, "labels has 3 elements for 2 input_ids"),
        (
            {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
            "labels and input_ids differ at position 0: where not -100 they must be the same, unshifted",
        ),
        (
            {"input_ids": [0, 2, 3], "loss_mask": [0, 1, 1], "attention_mask": [0, 1, 1]},
            "attention_mask has zeros: take the padding out",
        ),
        ({"input_ids": [1, 2], "loss_mask": [0, 0]}, "no scored tokens"),
        ({"input_ids": [1], "loss_mask": [1]}, "no scored tokens behind the first, which nothing precedes"),
        ({"input_ids": [], "loss_mask": []}, "no scored tokens"),
    ],
    ids=range(15),
)
def test_tokenized_rows_that_do_not_fit(fields, reason):
    with pytest.raises(SampleError) as caught:
        tokens(**fields)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("messages", {"prompt": "q"}, "field 'messages' is missing or null"),
        ("messages", {"messages": {"role": "user"}}, "'messages' is not a list"),
        ("messages", {"messages": []}, "'messages' holds no turns"),
        ("messages", {"messages": TURNS, "tools": 3}, "'tools' is not a list"),
        (
            "messages",
            {"messages": TURNS, "tools": ["{"]},
            "tools: not JSON: Expecting property name enclosed in double quotes at character 2",
        ),
        ("messages", {"messages": TURNS, "tools": [3]}, "'tools' is not a list of objects"),
        ("messages", {"messages": TURNS, "tools": np.array([1, 2])}, "'tools' is not a list"),
        ("conversations", {"conversations": GPT, "system": 3}, "'system' is not a string"),
        ("prompt+completion", {"prompt": "q"}, "field 'completion' is missing or null"),
        (
            "prompt+completion",
            {"prompt": "q", "completion": 3},
            "field 'completion' is neither a string nor a list of turns",
        ),
        ("instruction+output", {"instruction": "q", "output": 3}, "field 'output' is not a string"),
        (
            "instruction+output",
            {"instruction": "q", "output": "a", "input": 3},
            "field 'input' is not a string",
        ),
        (
            "instruction+output",
            {"instruction": "q", "output": "a", "history": [["q0", "a0"]]},
            "has earlier turns in 'history': give the row as messages",
        ),
    ],
    ids=range(13),
)
def test_rows_that_do_not_fit_their_layout(name, fields, reason):
    (layout,) = [layout for layout in LAYOUTS if layout.name == name]
    with pytest.raises(SampleError) as caught:
        layout.content(fields)
    assert str(caught.value) == reason
