from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pear_data.chat.end_of_turn import EndOfTurn
from pear_data.chat.frame import AddedTokens, TurnFrame
from pear_data.chat.messages import Conversation
from pear_data.chat.spans import (
    EXPANDED,
    LAST_ONLY,
    MARKER_APPENDED,
    MARKS_EXTENDED,
    OTHER_MODE,
    SpanFinder,
)
from pear_data.chat.template import ChatTemplate
from pear_data.errors import SampleError, UsageError

TOKENS = AddedTokens(
    frozenset({"<|u|>", "<|a|>", "<|t|>", "<|end|>", "<|call|>", "<|bos|>"}),
    frozenset({"<think>", "</think>"}),
)
PROMPT = "{% if add_generation_prompt %}<|a|>{% endif %}"
LOOP = "{% for m in messages %}<|{{ m.role[0] }}|>BODY<|end|>\n{% endfor %}"
PLAIN = LOOP.replace("BODY", "{{ m.content }}") + PROMPT
# Reasoning is rendered until a later message of the user's follows, as in Qwen3.
REWRITING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    + LOOP.replace(
        "BODY",
        "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>{{ m.reasoning_content or '' }}</think>"
        "{% endif %}{{ m.content }}",
    )
    + PROMPT
)

Finder = Callable[..., SpanFinder]


def finder(text: str, turns: Any = None) -> SpanFinder:
    template = ChatTemplate(text, {"bos_token": "<|bos|>"})
    frame = TurnFrame(template, TOKENS)
    return SpanFinder(template, frame, EndOfTurn(frame, TOKENS), turns)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def scored(spans: SpanFinder, *messages: dict[str, Any], tools: Any = None) -> list[list[str]]:
    texts = spans.scored_texts(Conversation(messages, tools))
    return [[sample.text[a:b] for a, b in sample.spans] for sample in texts]


TWO = [user("q"), assistant("a", reasoning_content="r"), user("p"), assistant("b", reasoning_content="s")]


def test_a_rewriting_template_asks_for_a_choice() -> None:
    with pytest.raises(UsageError, match=r"assistant turn 1 .* --turns last .* --turns all"):
        scored(finder(REWRITING), *TWO)
    assert scored(finder(REWRITING), *TWO[:2]) == [["<think>r</think>a<|end|>"]]


def test_turns_last_scores_the_last_turn_in_full() -> None:
    spans = finder(REWRITING, "last")
    (sample,) = spans.scored_texts(Conversation(TWO))
    assert sample.text == "<|u|>q<|end|>\n<|a|>a<|end|>\n<|u|>p<|end|>\n<|a|><think>s</think>b<|end|>\n"
    assert [sample.text[a:b] for a, b in sample.spans] == ["<think>s</think>b<|end|>"]
    assert sample.suffix == ""
    assert spans.notes[LAST_ONLY] == 1
    # A last turn that the user's next message would rewrite stands as it was answered.
    assert scored(spans, *TWO, user("more")) == [["<think>s</think>b<|end|>"]]
    assert scored(finder(PLAIN, "last"), user("q"), assistant("a"), user("p"), assistant("b")) == [
        ["b<|end|>"]
    ]


def test_turns_all_makes_a_sample_of_each_turn() -> None:
    spans = finder(REWRITING, "all")
    first, second = spans.scored_texts(Conversation(TWO))
    assert (first.suffix, second.suffix) == ("#1", "#2")
    assert first.text == "<|u|>q<|end|>\n<|a|><think>r</think>a<|end|>\n"
    assert second.text == "<|u|>q<|end|>\n<|a|>a<|end|>\n<|u|>p<|end|>\n<|a|><think>s</think>b<|end|>\n"
    assert [t.text[a:b] for t in (first, second) for a, b in t.spans] == [
        "<think>r</think>a<|end|>",
        "<think>s</think>b<|end|>",
    ]
    assert spans.notes[EXPANDED] == 1


def test_turns_all_expands_nothing_that_is_not_rewritten() -> None:
    spans = finder(PLAIN, "all")
    (sample,) = spans.scored_texts(Conversation([user("q"), assistant("a"), user("p"), assistant("b")]))
    assert sample.suffix == ""
    assert len(sample.spans) == 2
    (alone,) = finder(REWRITING, "all").scored_texts(Conversation(TWO[:2]))
    assert alone.suffix == ""


MARKED = (
    "{% for m in messages %}<|{{ m.role[0] }}|>{% if m.role == 'assistant' %}BODY"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)


def marked(body: str, prompt: str = "<|a|>") -> str:
    return MARKED.replace("BODY", body) + "{% if add_generation_prompt %}" + prompt + "{% endif %}"


def test_marks_lose_the_prompt_and_what_follows_the_end() -> None:
    prompt = "<|a|><think>\n"
    text = marked("{% generation %}<think>\n{{ m.content }}<|end|>\n<|bos|>{% endgeneration %}", prompt)
    assert scored(finder(text), user("q"), assistant("r</think>a")) == [["r</think>a<|end|>"]]


def test_marks_without_the_end_token_get_it() -> None:
    spans = finder(marked("{% generation %}{{ m.content }}{% endgeneration %}<|end|>\n"))
    assert scored(spans, user("q"), assistant("a"), user("p"), assistant("")) == [["a<|end|>"]]
    assert spans.notes[MARKS_EXTENDED] == 1


def test_marks_of_one_turn_that_touch_are_one_span() -> None:
    body = "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|end|>{% endgeneration %}\n"
    assert scored(finder(marked(body)), user("q"), assistant("a")) == [["a<|end|>"]]
    apart = "{% generation %}x{% endgeneration %}-{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    assert scored(finder(marked(apart)), user("q"), assistant("a")) == [["x", "a<|end|>"]]


def test_turns_without_marks_are_not_scored() -> None:
    body = (
        "{% if loop.last %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}\n"
    )
    assert scored(finder(marked(body)), user("q"), assistant("a"), user("p"), assistant("b")) == [
        ["b<|end|>"]
    ]


def test_marks_inside_a_macro_are_refused() -> None:
    macro = "{% macro turn(m) %}{{ 'Sure. ' }}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endmacro %}"
    spans = finder(macro + marked("{{ turn(m) }}\n"))
    for answer in ("a", "Something long."):
        with pytest.raises(UsageError, match="generation marks .* cut through"):
            scored(spans, user("q"), assistant(answer))


def test_the_next_role_marker_ends_a_turn_where_nothing_else_does() -> None:
    spans = finder("{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}{% endfor %}" + PROMPT)
    conversation = [user("q"), assistant("a"), user("p"), assistant("b"), user("r")]
    assert scored(spans, *conversation) == [["a<|u|>", "b<|u|>"]]
    assert spans.notes[MARKER_APPENDED] == 0
    assert scored(spans, *conversation[:4]) == [["a<|u|>", "b<|u|>"]]
    call = [{"function": {"name": "f", "arguments": {}}}]
    text = (
        "{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}"
    )
    assert scored(finder(text + PROMPT), user("q"), assistant("", tool_calls=call)) == [["f<|t|>"]]
    assert spans.notes[MARKER_APPENDED] == 1


def test_a_turn_with_another_end_stops_at_its_first_control_token() -> None:
    end = "{{ '<|call|><|t|>' if m.tool_calls else '<|end|>' }}"
    text = PLAIN.replace("<|end|>", end).replace(
        "{{ m.content }}", "{{ m.content }}{{ m.tool_calls[0].name if m.tool_calls }}"
    )
    call = assistant("x", tool_calls=[{"name": "f"}])
    spans = finder(text)
    assert scored(spans, user("q"), call) == [["xf<|call|>"]]
    no_end = text.replace("<|call|><|t|>", "")
    with pytest.raises(SampleError, match="no end-of-turn token behind assistant turn 1"):
        scored(finder(no_end), user("q"), call)


def test_what_ends_the_conversation_is_no_end_of_turn() -> None:
    text = PLAIN + "{% if not add_generation_prompt %}<|bos|>{% endif %}"
    assert scored(finder(text), user("q"), assistant("a")) == [["a<|end|>"]]


def test_a_turn_that_does_not_go_on_from_its_prompt_is_refused() -> None:
    text = PLAIN.replace("%}<|a|>{%", "%}<|a|><think>\n{%")
    assert scored(finder(text), user("q"), assistant("<think>\nr</think>a")) == [["r</think>a<|end|>"]]
    with pytest.raises(
        SampleError, match=r"assistant turn 1 does not go on .*<think>\\n'; .*--chat-template FILE"
    ):
        scored(finder(text), user("q"), assistant("a"))


def test_the_other_thinking_mode_has_a_prompt_of_its_own() -> None:
    modes = "{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\n' }}"
    text = PLAIN.replace("%}<|a|>{%", "%}<|a|>" + modes + "{%")
    spans = finder(text)
    assert scored(spans, user("q"), assistant("<think></think>a")) == [["a<|end|>"]]
    assert scored(spans, user("q"), assistant("<think>\nr</think>a")) == [["r</think>a<|end|>"]]
    assert spans.notes[OTHER_MODE] == 1


def test_texts_that_the_template_leaves_out_are_told() -> None:
    tools = [{"type": "function", "function": {"name": "search"}}]
    call = [{"function": {"name": "search", "arguments": {}}}]
    cases: list[tuple[list[dict[str, Any]], Any, str]] = [
        ([user("q"), assistant("a", reasoning_content="why")], None, r"assistant turn 1 \('why'\)"),
        ([user("q"), assistant("a", reasoning="a")], None, r"assistant turn 1 \('a'\)"),
        ([user("q"), assistant("search", tool_calls=call)], None, "the call of 'search' in assistant turn 1"),
        ([user("q"), assistant("a")], tools, "the tool 'search'"),
    ]
    for messages, offered, reason in cases:
        with pytest.raises(SampleError, match=f"{reason}; .*--chat-template FILE"):
            scored(finder(PLAIN), *messages, tools=offered)
    no_system = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(SampleError, match=r"message 1 \(system\)"):
        scored(finder(no_system), {"role": "system", "content": "rules"}, user("q"), assistant("a"))


def test_texts_of_the_context_may_be_json() -> None:
    text = PLAIN.replace(
        "{{ m.content }}", "{{ m.content if m.role == 'assistant' else m.content | tojson }}"
    )
    assert scored(finder(text), user('say "é"\n'), assistant("a")) == [["a<|end|>"]]


def test_a_conversation_that_starts_with_an_answer() -> None:
    text = "{{ bos_token }}<|t|>Today is a day.<|end|>" + PLAIN
    assert scored(finder(text), assistant("welcome"), user("q"), assistant("a")) == [
        ["welcome<|end|>", "a<|end|>"]
    ]
    bare = (
        "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else ' ' + m.content + '<|end|>' }}"
        "{% endfor %}"
    )
    assert scored(finder(bare), user("q"), assistant("a")) == [[" a<|end|>"]]
    with pytest.raises(SampleError, match="starts with an assistant turn"):
        scored(finder(bare), assistant("welcome"), user("q"), assistant("a"))


def test_a_prompt_left_to_the_turn_is_not_scored() -> None:
    # Behind a tool's answer this template adds no generation prompt, but the turn opens with it, as Gemma 4's does.
    text = PLAIN.replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt and messages[-1].role != 'tool' %}"
    )
    conversation = [user("q"), assistant("a"), {"role": "tool", "content": "r"}, assistant("b")]
    assert scored(finder(text), *conversation) == [["a<|end|>", "b<|end|>"]]


def test_what_the_template_refuses_is_told() -> None:
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + PLAIN
    with pytest.raises(SampleError, match="cannot render the conversation: No system role"):
        scored(finder(text), {"role": "system", "content": "s"}, user("q"), assistant("a"))
