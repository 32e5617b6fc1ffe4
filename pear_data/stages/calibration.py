"""How fast a policy's source scores: a small part of the corpus, spread over its lengths, timed after a warm-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import pyarrow as pa

from pear_data.corpus.batches import token_batch
from pear_data.stages.sources import PolicySource
from pear_data.stages.spread import GroupLengths, by_group, spread_rows
from pear_data.store import Store
from pear_data.store.manifest import CORPUS
from pear_data.tokens import IntArray, TokenBatch

WARM_UP_TOKENS = 256
GROWTH = 8  # of a run over the one before it
LEAST_SECONDS = 1.0  # a shorter run says little
GOAL_SECONDS = 3.0
MOST_TOKENS = 200_000


@dataclass(frozen=True, slots=True)
class Calibration:
    """The timed run."""

    num_tokens: IntArray  # of each sample, [n]
    num_scored: IntArray  # [n]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return float(self.num_tokens.sum()) / self.seconds


def calibrate(store: Store, source: PolicySource, longest: int) -> Calibration | None:
    """Time `source` on a few samples of at most `longest` tokens; None where the corpus has none.

    The first run warms the engine up; further ones grow until one is long enough to tell, each on samples of its own
    as far as they go, so that nothing is found in a cache.
    """
    table = _part(store, longest, source.corpus_columns)
    if not len(table):
        return None
    batch = token_batch(table)
    source.check_batch(batch)
    end = _run_end(batch, 0, WARM_UP_TOKENS)
    found = _timed(source, table, batch, 0, end)
    if end == len(batch):
        return _timed(source, table, batch, 0, end)
    measured = None
    while end < len(batch) and (measured is None or measured.seconds < LEAST_SECONDS):
        tokens = min(GROWTH * int(found.num_tokens.sum()), found.tokens_per_second * GOAL_SECONDS)
        start, end = end, _run_end(batch, end, tokens)
        found = measured = _timed(source, table, batch, start, end)
    return measured


def _part(store: Store, longest: int, columns: Sequence[str]) -> pa.Table:
    """Up to about MOST_TOKENS tokens of the corpus, in an order that is as good as random."""
    corpus = store.complete_stage(CORPUS)
    mean = sum(shard.num_tokens for shard in corpus.shards) / max(1, corpus.rows)
    places = spread_rows(lambda: _lengths(store, longest), max(1, round(MOST_TOKENS / max(1.0, mean))))
    rows = by_group(places)
    names = ["sample_id", "input_ids", "loss_mask", *columns]
    tables = []
    for shard in corpus.shards:
        if not any(name == shard.name for name, _ in rows):
            continue
        for group, table in enumerate(store.row_groups(shard, names)):
            if (shard.name, group) in rows:
                tables.append(table.take(pa.array(rows[shard.name, group])))
    if not tables:
        return pa.table({name: [] for name in names})
    order = np.random.default_rng(0).permutation(len(places))
    return pa.concat_tables(tables).take(pa.array(order)).combine_chunks()


def _lengths(store: Store, longest: int) -> Iterator[GroupLengths]:
    for shard in store.complete_stage(CORPUS).shards:
        for group, table in enumerate(store.row_groups(shard, ["sample_id", "num_tokens"])):
            num_tokens = table["num_tokens"].to_numpy()
            yield GroupLengths(shard.name, group, table["sample_id"], num_tokens, num_tokens <= longest)


def _run_end(batch: TokenBatch, start: int, tokens: float) -> int:
    """Where a run of about `tokens` tokens from row `start` on ends; it takes in a rest that is smaller than itself."""
    goal = batch.offsets[start] + tokens
    end = max(start + 1, int(np.searchsorted(batch.offsets, goal, side="right")) - 1)
    return len(batch) if batch.offsets[-1] - batch.offsets[end] < tokens else end


def _timed(source: PolicySource, table: pa.Table, batch: TokenBatch, start: int, end: int) -> Calibration:
    part = batch.take(np.arange(start, end))
    begun = perf_counter()
    source.score_group(part, table.slice(start, end - start), lambda tokens: None)
    return Calibration(part.num_tokens, part.num_scored, perf_counter() - begun)
