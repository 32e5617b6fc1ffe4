"""Written solutions: always right, and every step in them true."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from pear_data.demo.countdown import generate, verify
from pear_data.demo.solutions import Manner, messages, write_solution

STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
RESULT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


@given(
    st.integers(0, 2**32),
    st.sampled_from([3, 4]),
    st.floats(0, 1),
    st.integers(0, 3),
)
def test_solutions_are_right(seed: int, count: int, foresight: float, dead_ends: int) -> None:
    rng = random.Random(seed)
    puzzle = generate(rng, count)
    reply = write_solution(puzzle, Manner(foresight, (1, 1, 1), dead_ends), rng)
    assert verify(puzzle, reply)
    steps = STEP.findall(reply.rpartition("\n")[0])
    assert all(RESULT[sign](int(left), int(right)) == int(result) for left, sign, right, result in steps)
    assert len(re.findall(r" not \d+|I need", reply)) <= dead_ends


def test_foresight_without_patience_never_errs() -> None:
    rng = random.Random(1)
    for _ in range(50):
        puzzle = generate(rng, 4)
        reply = write_solution(puzzle, Manner(1.0, (1, 0, 0), 2), rng)
        assert len(reply.splitlines()) == 4


def test_chats() -> None:
    puzzle = generate(random.Random(2), 3)
    roles = [message["role"] for message in messages(puzzle, "Answer: 1", system=True)]
    assert roles == ["system", "user", "assistant"]
    assert messages(puzzle, None, system=False) == [{"role": "user", "content": puzzle.prompt}]
