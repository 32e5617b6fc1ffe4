from __future__ import annotations

import re
from datetime import date
from typing import Any

import pytest

from pear_data.chat.control_text import alternation
from pear_data.chat.frame import AddedTokens, TurnFrame
from pear_data.chat.messages import Conversation, with_content
from pear_data.chat.template import ChatTemplate
from pear_data.errors import SampleError, UsageError

TOKENS = AddedTokens(frozenset({"<|im_start|>", "<|im_end|>", "<s>", "</s>"}), frozenset({"<think>"}))
NONE = AddedTokens(frozenset(), frozenset())
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def frame(text: str, tokens: AddedTokens = TOKENS) -> TurnFrame:
    return TurnFrame(ChatTemplate(text, {"eos_token": "</s>"}), tokens)


def test_rendering_and_marks() -> None:
    text = "{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}{{ eos_token }}"
    template = ChatTemplate(text, {"eos_token": "</s>"})
    rendering = template.render(
        Conversation([{"role": "user", "content": "one"}, {"role": "user", "content": "é"}])
    )
    assert rendering.text == "[one][é]</s>"
    assert [rendering.text[a:b] for a, b in rendering.marks] == ["one", "é"]
    assert template.has_marks
    assert not ChatTemplate(CHATML, {}).has_marks


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}",
        "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}",
    ],
)
def test_the_date_is_that_given_whatever_the_clock_says(source: str) -> None:
    template = ChatTemplate(source, {}, date(2020, 2, 29))
    assert template.writes_date
    assert template.render(Conversation([{"role": "user", "content": "x"}])).text == "29 Feb 2020"
    assert not ChatTemplate(CHATML, {}, date(2020, 2, 29)).writes_date


def test_what_is_no_jinja_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not valid Jinja: .* \(line 2\); .*--chat-template FILE"):
        ChatTemplate("{# fine #}\n{% for m in messages %}", {})


@pytest.mark.parametrize("source", ["{{ messages[0].content + 1 }}", "{{ messages.no.such }}", "{{ 1 / 0 }}"])
def test_what_fails_in_rendering_is_a_samples_error(source: str) -> None:
    with pytest.raises(SampleError, match="cannot render the conversation: "):
        ChatTemplate(source, {}).render(Conversation([{"role": "user", "content": "x"}]))


def test_templates_run_in_a_sandbox() -> None:
    source = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SampleError):
        ChatTemplate(source, {}).render(Conversation([{"role": "user", "content": "x"}]))


def test_the_frame_of_chatml() -> None:
    for tokens in (TOKENS, NONE):
        found = frame(CHATML, tokens)
        assert (found.opening, found.end) == ("<|im_start|>assistant\n", "<|im_end|>")
        assert (found.prompts, found.as_parts, found.end_in_next) == (True, False, False)
    assert frame(CHATML).control_texts == {"<|im_start|>", "<|im_end|>"}
    assert frame(CHATML, NONE).control_texts == frozenset()


def test_an_end_of_several_tokens_is_one() -> None:
    assert frame(CHATML.replace("<|im_end|>\n", "<|im_end|></s>")).end == "<|im_end|></s>"


def test_contents_as_lists_of_parts() -> None:
    text = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    assert frame(text).as_parts


def test_content_is_brought_into_the_templates_form() -> None:
    def contents(*given: Any, as_parts: bool) -> list[Any]:
        conversation = Conversation([{"role": "user", "content": content} for content in given])
        return [m["content"] for m in with_content(conversation, as_parts=as_parts).messages]

    part, two = {"type": "text", "text": "b"}, [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]
    assert contents("a", [part], two, as_parts=True) == [[{"type": "text", "text": "a"}], [part], two]
    assert contents("a", [part], two, None, as_parts=False) == ["a", "b", two, None]


def test_templates_that_show_no_turn_are_refused() -> None:
    cases = {
        "{{ raise_exception('not today') }}": "not today",
        "{{ messages[0].content }}": "leaves out the text",
        CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", ""): (
            r"ignores add_generation_prompt .*'<\|im_start\|>assistant\\n'"
        ),
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}": "without an end-of-turn token",
    }
    for text, reason in cases.items():
        with pytest.raises(UsageError, match=f"{reason}.*--chat-template FILE"):
            frame(text)


def test_a_header_without_a_generation_prompt_is_fine_where_marks_show_the_turn() -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "\n{% endfor %}"
    )
    assert not frame(text).prompts


def test_alternation_prefers_the_longest() -> None:
    words = ["<a>", "<a>b", "<", "x.y", "x*", "<|im_end|>", "<|im_start|>", "日本", "日"]
    pattern = re.compile(alternation(words))
    for word in words:
        assert pattern.fullmatch(word)
    assert pattern.findall("<a>bc<a><x.yxzy 日本日 <|im_") == ["<a>b", "<a>", "<", "x.y", "日本", "日", "<"]
    assert re.compile(alternation([])).search("anything") is None
