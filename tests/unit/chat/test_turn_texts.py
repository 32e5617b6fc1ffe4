"""Which turns of two chat templates are the same text, and what in them stands for what."""

from __future__ import annotations

import pytest

from pear_data.chat.turn_texts import TurnText, corresponding
from pear_data.errors import SampleError

THINK = "<think>\nwhy\n</think>\n\n"


def pieces(one, other, content, before=("", ""), leads=("", ""), **fields):
    """Of one turn with these bodies; what both lack is left out."""
    first, second = (
        TurnText(0, prompt, body, end, lead)
        for prompt, body, end, lead in zip(before, (one, other), ("<e>", "</end>"), leads, strict=True)
    )
    found = corresponding([first], [second], [{"role": "assistant", "content": content, **fields}])
    assert found.pop() == (3, 6, False)
    return [piece for piece in found if piece[:2] != (0, 0)]


def test_the_same_text_is_one_piece():
    assert pieces("é a", "é a", "é a") == [(4, 4, True)]


@pytest.mark.parametrize(
    ("one", "other", "content", "want"),
    [
        ("a b", " a b", "a b", [(0, 1, False), (3, 3, True)]),
        ("a \n", "\ta ", "a", [(0, 1, False), (2, 2, True), (1, 0, False)]),
        ("a\n", "\na ", "a", [(0, 1, False), (1, 1, True), (1, 1, False)]),
        ("<think>\n\n</think>\n\na", "a", "a", [(19, 0, False), (1, 1, True)]),
        ("", "<think></think>", "", [(0, 15, False)]),
    ],
)
def test_white_space_and_think_tags_of_a_templates_own(one, other, content, want):
    assert pieces(one, other, content) == want


def test_a_lead_in_front_of_every_answer_is_the_templates_own():
    leads = ("", "<|channel|>final<|message|>")
    assert pieces("a b", f"{leads[1]}a b", "a b", leads=leads) == [(0, 27, False), (3, 3, True)]
    assert pieces(" a", f"{leads[1]} a", " a", leads=leads) == [(0, 27, False), (2, 2, True)]
    with pytest.raises(SampleError, match="different texts"):
        pieces(" a", f"{leads[1]}a", " a", leads=leads)
    with pytest.raises(SampleError, match="different texts"):
        pieces("a", "<|channel|>other<|message|>a", "a", leads=leads)


def test_a_think_tag_may_be_the_generation_prompts():
    body = THINK + "a"
    without = body.removeprefix("<think>\n")
    before = ("<assistant>\n", "<assistant><think>\n")
    assert pieces(body, without, body, before)[:2] == [(8, 0, False), (len(without), len(without), True)]
    assert pieces(body, without, "a", before, reasoning_content="why")[0] == (8, 0, False)
    assert pieces(f" {body}", without, body, before)[0] == (9, 0, False)
    assert pieces(f" {body}", body, body) == [(1, 0, False), (len(body), len(body), True)]
    with pytest.raises(SampleError, match="different texts"):
        pieces(body, without, body, ("<assistant>\n", "<assistant>"))


@pytest.mark.parametrize(
    ("one", "other", "content"),
    [
        ("a b", "a  b", "a b"),
        ("  a", "a", "  a"),
        ("a\n", "a", "a\n"),
        ("a", THINK + "a", "a"),
        ("<think>\n\nwhy</think>", "<think>\nwhy</think>", "<think>\n\nwhy</think>"),
        ("<think></think>  a", "a", "  a"),
        ("A", "a", "A"),
        ("   ", "", "   "),
    ],
)
def test_a_text_that_one_template_changes_is_no_match(one, other, content):
    with pytest.raises(SampleError, match="the two policies read different texts in message 1"):
        pieces(one, other, content)


def test_other_turns_or_no_end_are_no_match():
    turn = TurnText(0, "", "a", "<e>")
    message = [{"role": "assistant", "content": "a"}]
    with pytest.raises(SampleError, match="do not score the same assistant turns"):
        corresponding([turn], [turn, TurnText(2, "", "b", "<e>")], message)
    with pytest.raises(SampleError, match="no end of the turn of message 1"):
        corresponding([turn], [TurnText(0, "", "a", "")], message)
