"""What the demo's policies are trained on, and the puzzles kept from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from zlib import crc32

from transformers import Qwen2Tokenizer

from pear_data.demo.countdown import Puzzle, generate
from pear_data.demo.policies import Chat, Encoded, encode
from pear_data.demo.solutions import Manner, messages, write_solution

THREE_SHARE = 0.6  # of puzzles with three numbers
SYSTEM_SHARE = 0.3  # of chats that open with a system message
BATCH_ROWS = 16
POOL_BATCHES = 32


def held_out(puzzle: Puzzle) -> bool:
    """Whether a puzzle, in any order of its numbers, is kept from training: one in four."""
    return crc32(f"{sorted(puzzle.numbers)} {puzzle.target}".encode()) % 4 == 0


def puzzles(rng: random.Random, *, fresh: bool) -> Iterator[Puzzle]:
    """Endless puzzles of three and four numbers; `fresh` ones are those no policy was trained on."""
    while True:
        if held_out(puzzle := generate(rng, 3 if rng.random() < THREE_SHARE else 4)) is fresh:
            yield puzzle


def training_chats(manner: Manner, rng: random.Random) -> Iterator[Chat]:
    """Endless solved puzzles in one manner."""
    for puzzle in puzzles(rng, fresh=False):
        yield messages(puzzle, write_solution(puzzle, manner, rng), system=rng.random() < SYSTEM_SHARE)


def training_batches(
    tokenizer: Qwen2Tokenizer, manner: Manner, rng: random.Random
) -> Iterator[list[Encoded]]:
    """Batches of BATCH_ROWS chats of like length, so that little is padding."""
    chats = training_chats(manner, rng)
    while True:
        pool = [encode(tokenizer, next(chats)) for _ in range(BATCH_ROWS * POOL_BATCHES)]
        pool.sort(key=lambda row: len(row[0]))
        batches = [pool[start : start + BATCH_ROWS] for start in range(0, len(pool), BATCH_ROWS)]
        rng.shuffle(batches)
        yield from batches
