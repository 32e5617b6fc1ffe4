"""The verifier: what it accepts, what it must not, and that it agrees with brute force."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_data.demo.countdown import MAX_ANSWER_CHARACTERS, Puzzle, generate, moves, solvable, verify

PUZZLE = Puzzle((2, 5, 6), 60)


@pytest.mark.parametrize("expression", ["2*5*6", "5 * 6 * 2", "(6*(2*5))", "((6)*(5))*2", "6/( 2/5/(2*2) )"])
def test_expressions(expression: str) -> None:
    used = sorted(int(digit) for digit in expression if digit.isdecimal())
    assert verify(PUZZLE, f"Answer: {expression}") is (used == [2, 5, 6])


def test_fractions_on_the_way_are_exact() -> None:
    assert verify(Puzzle((3, 3, 8, 8), 24), "Answer: 8/(3-8/3)")
    assert verify(Puzzle((3, 3, 7, 7), 24), "Answer: 7*(3+3/7)")
    assert not verify(Puzzle((2, 3, 7), 5), "Answer: 7*2/3")  # 4.67, not rounded


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "2*5*6",
        "Answer: ",
        "Answer:2*5*6",
        "answer: 2*5*6",
        " Answer: 2*5*6",
        "Answer:  2*5*6",
        "Answer: 2*5*6 ",
        "Answer: 2*5*6 = 60",
        "Answer: 2*5*6.",
        "Answer: 60",
        "Answer: 10*6",
        "Answer: 6*5*2+2-2",
        "Answer: 2*5+6",
        "Answer: (2*5*6",
        "Answer: 2*5*6)",
        "Answer: 25 6",
        "Answer: 2*(5)(6)",
        "Answer: 2*05*6",
        "Answer: 2*5.0*6",
        "Answer: 2*\uff15*6",
        "Answer: (-2)*(-5)*6",
        "Answer: 2*5*6\n",
        "Answer: 2*5*6\r",
        "Answer: 2*5*6\nDone.",
        "Answer: 2*5*6\nAnswer: 2*5*6",
        "The Answer: is near\nAnswer: 2*5*6",
        "Answer: __import__('os')",
        "Answer: " + "(" * 5000 + "2" + ")" * 5000,
        "Answer: " + "9" * 5000,
    ],
)
def test_replies_that_do_not_solve(reply: str) -> None:
    assert not verify(PUZZLE, reply)


def test_only_the_four_operations() -> None:
    assert not verify(Puzzle((2, 3, 7), 15), "Answer: 2**3+7")
    assert not verify(Puzzle((2, 3, 7), 5), "Answer: 7//3+3")
    assert not verify(Puzzle((2, 3, 7), 15), "Answer: 7//2*3+6")
    assert not verify(Puzzle((2, 3, 7), 21), "Answer: 7*3/(2-2)")


def test_only_the_last_line_counts() -> None:
    assert verify(PUZZLE, "5*6=31, left [2,31].\nAnswer: 5*6*2")
    assert not verify(PUZZLE, "5*6=30, left [2,30].\n30*2=60, done.\nAnswer: 5*6+2")


def test_long_answers_are_refused() -> None:
    room = MAX_ANSWER_CHARACTERS - len("Answer: 2*5*6")
    assert verify(PUZZLE, f"Answer: 2*5*{' ' * room}6")
    assert not verify(PUZZLE, f"Answer: 2*5*{' ' * (room + 1)}6")


@given(st.text())
def test_no_text_makes_it_fail(text: str) -> None:
    assert verify(PUZZLE, text) is False
    assert verify(PUZZLE, f"Answer: {text}") in (True, False)


@given(st.text(alphabet="0123456789+-*/() ", max_size=40))
def test_no_expression_makes_it_fail(text: str) -> None:
    assert verify(Puzzle((1, 2, 3), 6), f"Answer: {text}") in (True, False)


@given(st.integers(0, 2**32), st.sampled_from([3, 4]))
def test_agrees_with_brute_force(seed: int, count: int) -> None:
    """Every left-to-right expression over a puzzle's numbers, against values computed here with Fraction."""
    rng = random.Random(seed)
    numbers = tuple(rng.randint(1, 12) for _ in range(count))
    order = rng.choice(list(permutations(numbers)))
    signs = rng.choice(list(product("+-*/", repeat=count - 1)))
    value, text = Fraction(order[0]), str(order[0])
    for sign, number in zip(signs, order[1:], strict=True):
        text = f"({text}){sign}{number}"
        value = {"+": value + number, "-": value - number, "*": value * number, "/": value / number}[sign]
    for target in {round(value), round(value) + 1}:
        assert verify(Puzzle(numbers, target), f"Answer: {text}") is (value == target)


@given(st.integers(0, 2**32), st.sampled_from([3, 4]))
def test_generated_puzzles(seed: int, count: int) -> None:
    puzzle = generate(random.Random(seed), count)
    assert puzzle == generate(random.Random(seed), count)
    assert len(puzzle.numbers) == count
    assert 10 <= puzzle.target <= 40
    assert solvable(puzzle.numbers, puzzle.target)
    assert Puzzle.from_prompt(puzzle.prompt) == puzzle


@pytest.mark.parametrize(
    "text", ["", "Use each of 1, 2 once to make 3.", "Use each of 1, 2, 3 once to make 6. Now!"]
)
def test_other_text_is_no_prompt(text: str) -> None:
    with pytest.raises(ValueError, match="not a countdown prompt"):
        Puzzle.from_prompt(text)


def test_moves_stay_within_bounds() -> None:
    assert {str(move) for move in moves((12, 3, 48))} == {
        "12+3=15", "12-3=9", "12*3=36", "12/3=4", "48-12=36", "48/12=4", "48-3=45", "48/3=16",
    }  # fmt: skip
    assert {str(move) for move in moves((5, 1))} == {"5+1=6", "5-1=4"}
    assert {str(move) for move in moves((60, 60))} == {"60/60=1"}
    assert not solvable((2, 2, 2), 60)
