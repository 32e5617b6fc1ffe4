"""Worked Countdown solutions in a chosen manner: what the demo's policies learn from."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pear_data.demo.countdown import Move, Numbers, Puzzle, moves, solvable

SYSTEM = "Use + - * / and think step by step. End with one line, Answer: and the expression."

# Three ways to word each kind of line. The verdict comes last, after the two numbers it compares.
_STEP = ("{move}, left {left}.", "Try {move}, which leaves {left}.", "Maybe {move}, then {left} remain.")
_DEAD_END = (
    "{move}, need {target}, back to {left}.",
    "Try {move}, but is it {target}? No, back to {left}.",
    "Maybe {move}, I want {target}, so again from {left}.",
)
_LAST = (
    "{move}, need {target}, done.",
    "Try {move}, but is it {target}? Yes.",
    "Maybe {move}, I want {target}, good.",
)


@dataclass(frozen=True, slots=True)
class Manner:
    """How a writer goes about it.

    `foresight` is the share of steps chosen for leading to the target (the others are drawn from all legal ones; the
    step that joins the last two numbers is always chosen), `wording` the weights of the three phrasings, `dead_ends`
    the most dead ends one solution may hold.
    """

    foresight: float
    wording: tuple[float, float, float]
    dead_ends: int


def write_solution(puzzle: Puzzle, manner: Manner, rng: random.Random) -> str:
    """A reply that ends in a right answer, after at most `manner.dead_ends` dead ends told as they happen."""
    lines: list[str] = []
    path: list[Move] = []
    state, patience = puzzle.numbers, manner.dead_ends
    while len(state) > 1:
        options = moves(state)
        if len(state) == 2 or not patience or rng.random() < manner.foresight:
            options = tuple(move for move in options if solvable(move.remaining, puzzle.target)) or options
        move = rng.choice(options)
        path.append(move)
        state = move.remaining
        if len(state) > 1:
            lines.append(_say(_STEP, manner, rng, move=move, left=_listed(state)))
        elif move.result == puzzle.target:
            lines.append(_say(_LAST, manner, rng, move=move, target=puzzle.target))
        else:
            path, state, patience = [], puzzle.numbers, patience - 1
            lines.append(_say(_DEAD_END, manner, rng, move=move, target=puzzle.target, left=_listed(state)))
    return "\n".join([*lines, f"Answer: {_expression(puzzle.numbers, path)}"])


def messages(puzzle: Puzzle, reply: str | None, *, system: bool) -> list[dict[str, str]]:
    """The puzzle as a chat, with the reply where there is one."""
    chat = [{"role": "system", "content": SYSTEM}] if system else []
    chat.append({"role": "user", "content": puzzle.prompt})
    return chat if reply is None else [*chat, {"role": "assistant", "content": reply}]


def _say(phrasings: tuple[str, ...], manner: Manner, rng: random.Random, **facts: object) -> str:
    return rng.choices(phrasings, manner.wording)[0].format(**facts)


def _listed(numbers: Numbers) -> str:
    return f"[{','.join(map(str, numbers))}]"


def _expression(numbers: Numbers, path: list[Move]) -> str:
    """The steps of a path folded into one expression; every composite operand stands in parentheses."""
    terms = [(number, str(number)) for number in numbers]
    for move in path:
        operands = []
        for value in (move.left, move.right):
            place = next(i for i, (held, _) in enumerate(terms) if held == value)
            operands.append(terms.pop(place)[1])
        left, right = (text if text.isdecimal() else f"({text})" for text in operands)
        terms.append((move.result, f"{left}{move.sign}{right}"))
    return terms[0][1]
