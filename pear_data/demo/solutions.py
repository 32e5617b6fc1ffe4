"""Worked Countdown solutions in a chosen manner: what the demo's policies learn from."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pear_data.demo.countdown import Move, Numbers, Puzzle, moves, solvable

SYSTEM = "Use + - * / and think step by step. End with one line, Answer: and the expression."

# Three ways to word each kind of line.
_STEP = ("{move}, left {left}.", "Try {move}, which leaves {left}.", "Maybe {move}, then {left} remain.")
_DEAD_END = (
    "{move}, not {target}, back to {left}.",
    "But {move} is not {target}, so go back to {left}.",
    "Then {move}, and I need {target}, so again from {left}.",
)
_LAST = ("{move}, done.", "Now {move}, as wanted.", "So {move}, that works.")


@dataclass(frozen=True, slots=True)
class Manner:
    """How a writer goes about it.

    `foresight` is the share of steps chosen for leading to the target (the others are drawn from all not yet failed),
    `wording` the weights of the three phrasings, `dead_ends` the most dead ends one solution may hold.
    """

    foresight: float
    wording: tuple[float, float, float]
    dead_ends: int


def write_solution(puzzle: Puzzle, manner: Manner, rng: random.Random) -> str:
    """A reply that ends in a right answer, after at most `manner.dead_ends` dead ends told as they happen."""
    lines: list[str] = []
    path: list[tuple[Numbers, Move]] = []
    failed: set[Move] = set()
    state, patience = puzzle.numbers, manner.dead_ends
    while len(state) > 1:
        options = [move for move in moves(state) if move not in failed] or list(moves(state))
        if not patience or rng.random() < manner.foresight:
            options = [move for move in options if solvable(move.remaining, puzzle.target)] or options
        move = rng.choice(options)
        if len(state) > 2:
            lines.append(_say(_STEP, manner, rng, move=move, left=_listed(move.remaining)))
            path.append((state, move))
            state = move.remaining
        elif move.result == puzzle.target:
            lines.append(_say(_LAST, manner, rng, move=move))
            path.append((state, move))
            break
        else:
            path, state = _back(path, state, puzzle.target)
            lines.append(_say(_DEAD_END, manner, rng, move=move, target=puzzle.target, left=_listed(state)))
            failed.add(move)
            patience -= 1
    return "\n".join([*lines, f"Answer: {_expression(puzzle.numbers, [move for _, move in path])}"])


def messages(puzzle: Puzzle, reply: str | None, *, system: bool) -> list[dict[str, str]]:
    """The puzzle as a chat, with the reply where there is one."""
    chat = [{"role": "system", "content": SYSTEM}] if system else []
    chat.append({"role": "user", "content": puzzle.prompt})
    return chat if reply is None else [*chat, {"role": "assistant", "content": reply}]


def _back(
    path: list[tuple[Numbers, Move]], state: Numbers, target: int
) -> tuple[list[tuple[Numbers, Move]], Numbers]:
    """The path without the steps that led astray, and the latest state from which the target can be reached."""
    kept = list(path)
    while not solvable(state, target):
        state, _ = kept.pop()
    return kept, state


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
