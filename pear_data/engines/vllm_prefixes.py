"""Samples that begin alike, as requests that compute each row of what they share once.

Row r of a sample predicts its token r + 1. Sorted by their ids, samples that share a prefix are neighbours: the first
is asked for all its rows, the next ones only from where they part on, so that a prefix vLLM finds in its cache does
not reach into rows that are asked for. At the row where samples part, the one that computes it scores the next token
of each. Identical samples are asked for once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]
MAX_TARGETS = (
    64  # tokens scored at one row; where more samples part, some are computed from the beginning again
)


@dataclass(frozen=True, slots=True)
class Request:
    """What vLLM is asked for: the log-prob of each of `targets[i]` after row `start + i`, -1 standing for none."""

    ids: Ids  # [length]
    start: int
    targets: Ids  # [length - 1 - start, k]; column 0 is ids[start + 1:]
    read_cache: bool


@dataclass(eq=False, slots=True)
class _Node:
    """A sample in the tree; its rows before `shared` are its parent's."""

    ids: Ids
    low: int  # first row that it, or a sample that rests on it, needs
    parent: _Node | None = None
    shared: int = 0
    read_cache: bool = True
    column: int = 0  # where the parent scores the token after row `shared - 1`
    parting: list[tuple[int, int, int]] = field(default_factory=list)  # row, column, token of its children

    @property
    def start(self) -> int:
        return max(self.shared, self.low)

    def owner(self, row: int) -> _Node:
        """The sample that computes `row` of this one."""
        node = self
        while node.parent is not None and row < node.shared:
            node = node.parent
        return node

    def request(self) -> Request:
        width = max((column for _, column, _ in self.parting), default=0) + 1
        targets = np.full((len(self.ids) - 1 - self.start, width), -1, dtype=np.int32)
        targets[:, 0] = self.ids[self.start + 1 :]
        for row, column, token in self.parting:
            targets[row - self.start, column] = token
        return Request(self.ids, self.start, targets, self.read_cache)


class PrefixTree:
    """The requests for `samples`, and their log-probs from the answers.

    Args:
        samples: token ids, each up to its last token to score.
        firsts: the position of each sample's first token to score, at least 1.
        share: whether a sample may rest on another's rows; if not, only identical samples are joined.

    `requests` are by the sample's index, in the order that finds prefixes in the cache; samples without a row of
    their own have none.
    """

    def __init__(self, samples: list[Ids], firsts: list[int], *, share: bool) -> None:
        self._firsts = firsts
        self._nodes = [_Node(ids, first - 1) for ids, first in zip(samples, firsts, strict=True)]
        self._order = sorted(range(len(samples)), key=lambda i: samples[i].astype(">i4").tobytes())
        in_order = [self._nodes[i] for i in self._order]
        _join(in_order, share)
        _find_needed_rows(in_order)
        self.requests: dict[int, Request] = {}
        for i in self._order:
            if self._nodes[i].start < len(samples[i]) - 1:
                self.requests[i] = self._nodes[i].request()

    def logprobs(self, answers: Mapping[int, Logprobs]) -> list[Logprobs]:
        """Of each sample's tokens from the first to score on, from answers shaped as the requests' targets."""
        owned = {id(self._nodes[i]): answer for i, answer in answers.items()}
        found: dict[int, Logprobs] = {}  # of the tokens after row `low`
        for i in self._order:
            node = self._nodes[i]
            rows = owned[id(node)][:, 0] if i in self.requests else np.empty(0, dtype=np.float32)
            if node.parent is not None and node.low < node.shared:
                above = node.parent
                inherited = found[id(above)][node.low - above.low : node.shared - above.low]
                rows = np.concatenate((inherited, rows))
                if node.column:
                    parting = node.shared - 1
                    rows[parting - node.low] = owned[id(above)][parting - above.start, node.column]
            found[id(node)] = rows
        return [
            found[id(node)][first - 1 - node.low :]
            for node, first in zip(self._nodes, self._firsts, strict=True)
        ]


def _join(in_order: list[_Node], share: bool) -> None:
    """Give each node the parent that computes the last row they share."""
    parted: Counter[tuple[int, int]] = Counter()
    for previous, node in pairwise(in_order):
        common = _common_length(previous.ids, node.ids)
        if common == len(node.ids):
            node.parent, node.shared = previous, common
            continue
        # The last row of a prompt is in no answer: it predicts what would be generated.
        common -= common == len(previous.ids)
        if not share or common == 0:
            continue
        owner = previous.owner(common - 1)
        parted[id(owner), common] += 1
        if parted[id(owner), common] < MAX_TARGETS:
            node.parent, node.shared = owner, common
        else:
            node.read_cache = False


def _find_needed_rows(in_order: list[_Node]) -> None:
    """Lower each node's `low` to what rests on it, then give it the tokens to score where others part from it."""
    for node in reversed(in_order):
        if node.parent is not None and node.low < node.shared:
            node.parent.low = min(node.parent.low, node.low)
    columns: Counter[tuple[int, int]] = Counter()
    for node in in_order:
        at = node.shared
        if node.parent is None or node.low >= at or at == len(node.ids):
            continue
        if node.ids[at] != node.parent.ids[at]:
            columns[id(node.parent), at] += 1
            node.column = columns[id(node.parent), at]
            node.parent.parting.append((at - 1, node.column, int(node.ids[at])))


def _common_length(one: Ids, other: Ids) -> int:
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter
