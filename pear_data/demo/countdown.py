"""Countdown: reach a target from three or four numbers, each used once, with + - * and /.

The prompt states the puzzle, the reply reasons line by line and ends in `Answer: <expression>`; `verify` accepts a
reply by that last line alone, with exact arithmetic.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

Numbers = tuple[int, ...]

SMALLEST, LARGEST = 2, 10  # of a puzzle's numbers
TARGETS = range(10, 41)
CEILING = 50  # no intermediate result is larger
MAX_ANSWER_CHARACTERS = 100

_PROMPT = re.compile(r"Use each of (\d{1,3}(?:, \d{1,3}){2,3}) once to make (\d{1,3})\.")
_ANSWER = re.compile(r"Answer: ([0-9(][0-9+\-*/() ]*[0-9)])")
_EXACT: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Make `target` from `numbers`, using each of them exactly once."""

    numbers: Numbers
    target: int

    @property
    def prompt(self) -> str:
        """The user's message."""
        listed = ", ".join(map(str, self.numbers))
        return f"Use each of {listed} once to make {self.target}."

    @classmethod
    def from_prompt(cls, text: str) -> Puzzle:
        """The puzzle a user's message states; raises ValueError where it states none."""
        if (found := _PROMPT.fullmatch(text)) is None:
            raise ValueError(f"not a countdown prompt: {text[:80]!r}")
        return cls(tuple(map(int, found[1].split(", "))), int(found[2]))


@dataclass(frozen=True, slots=True)
class Move:
    """One step: two of the numbers at hand become one. The larger operand comes first."""

    left: int
    sign: str
    right: int
    result: int
    remaining: Numbers  # the untouched numbers in their order, then the result

    def __str__(self) -> str:
        return f"{self.left}{self.sign}{self.right}={self.result}"


def generate(rng: random.Random, count: int) -> Puzzle:
    """A solvable puzzle of `count` numbers, found by playing random moves until they end on a fair target."""
    while True:
        numbers = tuple(rng.randint(SMALLEST, LARGEST) for _ in range(count))
        state = numbers
        while len(state) > 1:
            state = rng.choice(moves(state)).remaining
        if state[0] in TARGETS:
            return Puzzle(numbers, state[0])


@lru_cache(maxsize=1 << 16)
def moves(numbers: Numbers) -> tuple[Move, ...]:
    """Every step that stays within the positive integers up to CEILING and changes a value."""
    return tuple(
        move
        for i in range(len(numbers))
        for j in range(i + 1, len(numbers))
        for move in _combine(
            max(numbers[i], numbers[j]),
            min(numbers[i], numbers[j]),
            numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :],
        )
    )


def _combine(large: int, small: int, rest: Numbers) -> Iterator[Move]:
    results = {"+": large + small, "-": large - small}
    if small > 1:
        results["*"] = large * small
        if large % small == 0:
            results["/"] = large // small
    for sign, result in results.items():
        if 0 < result <= CEILING:
            yield Move(large, sign, small, result, (*rest, result))


def solvable(numbers: Numbers, target: int) -> bool:
    """Whether some sequence of moves leads from `numbers` to `target`."""
    return target in _reachable(tuple(sorted(numbers)))


@lru_cache(maxsize=1 << 18)
def _reachable(numbers: Numbers) -> frozenset[int]:
    if len(numbers) == 1:
        return frozenset(numbers)
    return frozenset().union(*(_reachable(tuple(sorted(move.remaining))) for move in moves(numbers)))


def verify(puzzle: Puzzle, answer_text: str) -> bool:
    """Whether a reply solves the puzzle.

    The reply's last line, and no other, must read `Answer: <expression>`: decimal integers, + - * /, parentheses,
    and spaces between them. The expression must use each of the puzzle's numbers exactly once and be exactly the
    target; fractions on the way are fine.
    """
    *reasoning, last = answer_text.split("\n")
    found = _ANSWER.fullmatch(last)
    if found is None or len(last) > MAX_ANSWER_CHARACTERS or any("Answer:" in line for line in reasoning):
        return False
    used: list[int] = []
    try:
        value = _evaluate(ast.parse(found[1], mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False
    return value == puzzle.target and sorted(used) == sorted(puzzle.numbers)


def _evaluate(node: ast.expr, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _EXACT:
            return _EXACT[type(sign)](_evaluate(left, used), _evaluate(right, used))
        case _:
            raise ValueError("not plain arithmetic")
