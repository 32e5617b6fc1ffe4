"""Which samples share a forward pass, and which of their tokens are computed once for several of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pear_data.engines.batching import spans
from pear_data.tokens import IntArray, TokenBatch

Ids = npt.NDArray[np.int32]

# Shorter shared prompts cost more in their responses' attention than they save.
LEAST_SHARED = 32
# A prompt with many responses may fill this many packs' worth of tokens before it is computed a second time.
SHARED_PACKS = 4


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that begin with the same `prefix` tokens, none of them scored; one sample where prefix is 0."""

    rows: IntArray
    prefix: int
    num_tokens: int  # to run: the prefix once, and what each sample has of its own


@dataclass(frozen=True, slots=True)
class Pack:
    """The tokens of one forward pass, back to back without padding: M tokens in s sequences.

    Sequence i is tokens [starts[i], starts[i] + lengths[i]) and goes on from the tokens
    [prefix_starts[i], prefix_starts[i] + prefix_lengths[i]), another sequence of the pack, where those are any.
    """

    input_ids: IntArray  # [M]
    positions: IntArray  # [M], of each token in its sample
    starts: IntArray  # [s]
    lengths: IntArray  # [s]
    prefix_starts: IntArray  # [s]
    prefix_lengths: IntArray  # [s]
    rows: IntArray  # samples scored here, in the order of `predicting`
    predicting: IntArray  # [scored tokens of `rows`], the token whose row predicts each
    targets: IntArray  # [scored tokens of `rows`], the ids predicted


def distinct_rows(batch: TokenBatch) -> tuple[IntArray, IntArray]:
    """Rows that differ in ids or loss mask, first ones first, and for each row of the batch which of them it equals."""
    seen: dict[tuple[bytes, bytes], int] = {}
    same_as = np.empty(len(batch), dtype=np.int64)
    first: list[int] = []
    for row in range(len(batch)):
        place = slice(*batch.offsets[row : row + 2])
        key = (batch.input_ids[place].tobytes(), batch.loss_mask[place].tobytes())
        same_as[row] = seen.setdefault(key, len(seen))
        if same_as[row] == len(first):
            first.append(row)
    return np.array(first, dtype=np.int64), same_as


def shared_prefix_groups(batch: TokenBatch, needed: IntArray, budget: int) -> list[Group]:
    """Every sample with a needed token, in groups that compute their common prompt once.

    Args:
        batch: n samples.
        needed: tokens of each to run, [n]; samples with none are left out.
        budget: tokens of a pack; a group holds at most SHARED_PACKS times as many, unless one sample does.
    """
    rows = np.flatnonzero(needed)
    if not len(rows):
        return []
    scored = np.flatnonzero(batch.loss_mask)
    prompt = np.zeros(len(batch), dtype=np.int64)
    prompt[rows] = scored[batch.scored_offsets[rows]] - batch.offsets[rows]
    prompts = {row: batch.input_ids[batch.offsets[row] :][: prompt[row]] for row in rows.tolist()}
    # Big-endian bytes sort like the ids themselves, so that equal beginnings become neighbours.
    order = sorted(prompts, key=lambda row: prompts[row].astype(">i4").tobytes())
    shared = [_common(prompts[one], prompts[other]) for one, other in pairwise(order)]
    groups: list[Group] = []
    for places, prefix in _cheapest_cover([n if n >= LEAST_SHARED else 0 for n in shared]):
        groups += _split(np.array(order, dtype=np.int64)[places], prefix, needed, budget * SHARED_PACKS)
    return groups


_Shared = tuple[list[int], int]  # places of prompts, and the tokens they have in common


def _cheapest_cover(shared: Sequence[int]) -> list[_Shared]:
    """Divide len(shared) + 1 sorted prompts into groups that save much.

    Args:
        shared: tokens that each prompt begins with in common with the next.

    Families with more in common lie nested inside families with less, and are settled first; that is greedy.
    """
    families: list[tuple[int, list[_Shared]]] = [(0, [])]  # still open: common tokens, groups so far
    for place, following in enumerate([*shared, 0]):
        single: _Shared = ([place], 0)
        if following > families[-1][0]:
            families.append((following, [single]))
            continue
        families[-1][1].append(single)
        while families[-1][0] > following:
            settled = _join(*families.pop())
            if families[-1][0] < following:
                families.append((following, []))
            families[-1][1].extend(settled)
    return families[0][1]


def _join(common: int, groups: list[_Shared]) -> list[_Shared]:
    """Groups of one family, those put together that save more by sharing its common tokens."""
    joining = [(len(places) - 1) * own < len(places) * common for places, own in groups]
    gain = sum(
        len(places) * common - (len(places) - 1) * own
        for (places, own), joins in zip(groups, joining, strict=True)
        if joins
    )
    if gain <= common:  # one of them still has to compute it
        return groups
    together = [
        place for (places, _), joins in zip(groups, joining, strict=True) if joins for place in places
    ]
    return [(together, common), *(group for group, joins in zip(groups, joining, strict=True) if not joins)]


def _common(one: Ids, other: Ids) -> int:
    """How many tokens two prompts begin with in common."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _split(rows: IntArray, prefix: int, needed: IntArray, limit: int) -> Iterator[Group]:
    """The rows in their order as groups of at most `limit` tokens, or of one row."""
    own = needed[rows] - prefix
    ends = np.cumsum(own)
    first = 0
    while first < len(rows):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + limit - prefix, side="right")))
        shared = prefix if last - first > 1 else 0
        total = int(own[first:last].sum()) + (shared or prefix)
        yield Group(rows[first:last], shared, total)
        first = last


def fill_packs(groups: Sequence[Group], budget: int) -> Iterator[list[Group]]:
    """Groups in packs of at most `budget` tokens, or of one group: the largest with the smallest that still fit."""
    order = sorted(groups, key=lambda group: -group.num_tokens)
    first, last = 0, len(order) - 1
    while first <= last:
        pack = [order[first]]
        room = budget - order[first].num_tokens
        first += 1
        while first <= last and order[first].num_tokens <= room:
            room -= order[first].num_tokens
            pack.append(order[first])
            first += 1
        while first <= last and order[last].num_tokens <= room:
            room -= order[last].num_tokens
            pack.append(order[last])
            last -= 1
        yield pack


def lay_out(batch: TokenBatch, needed: IntArray, groups: Sequence[Group]) -> Pack:
    """The tokens of some groups back to back: of each the shared prompt, then what every sample has of its own."""
    # One line per sequence: its sample, its first position there, its length, its prefix, and the sequence that is.
    table: list[tuple[int, int, int, int, int]] = []
    samples: list[int] = []  # the sequences that end a sample
    for group in groups:
        head = len(table)
        if group.prefix:
            table.append((int(group.rows[0]), 0, group.prefix, 0, head))
        for row in group.rows.tolist():
            samples.append(len(table))
            table.append((row, group.prefix, int(needed[row]) - group.prefix, group.prefix, head))
    rows, begins, lengths, prefix_lengths, heads = np.array(table, dtype=np.int64).T
    starts = np.cumsum(lengths) - lengths
    prefix_starts = np.where(prefix_lengths > 0, starts[heads], 0)

    scored, counts = _scored_positions(batch, rows[samples])
    before = scored - 1
    begin, start, prefix_start = (
        np.repeat(values[samples], counts) for values in (begins, starts, prefix_starts)
    )
    return Pack(
        input_ids=batch.input_ids[spans(batch.offsets[rows] + begins, lengths)].astype(np.int64),
        positions=spans(begins, lengths),
        starts=starts,
        lengths=lengths,
        prefix_starts=prefix_starts,
        prefix_lengths=prefix_lengths,
        rows=rows[samples],
        predicting=np.where(before < begin, prefix_start + before, start + before - begin),
        targets=batch.input_ids[np.repeat(batch.offsets[rows[samples]], counts) + scored].astype(np.int64),
    )


def _scored_positions(batch: TokenBatch, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Positions of the scored tokens in their samples, the rows one after the other, and how many each row has."""
    places = spans(batch.offsets[rows], batch.num_tokens[rows])
    positions = spans(np.zeros(len(rows), dtype=np.int64), batch.num_tokens[rows])
    return positions[batch.loss_mask[places]], batch.num_scored[rows]
