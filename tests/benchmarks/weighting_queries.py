"""Common questions over a store, by `pear-data sql`'s views and by hand.

    python tests/benchmarks/weighting_queries.py                       # makes a store of 40M tokens for it
    python tests/benchmarks/weighting_queries.py --spans               # whose teacher has another tokenizer
    python tests/benchmarks/weighting_queries.py --mean-tokens 50      # of about 1M short samples
    python tests/benchmarks/weighting_queries.py --store DIR           # weighted as block, token and sequence

Both run on warm connections, in turns, on all cores; the medians are compared. By hand means the files alone, without a
join: for what sums and histograms answer, from the weights; for a scan of tokens, each list column unnested by itself.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import duckdb
from rich.console import Console
from rich.table import Table
from synthetic_store import make_store

from pear_data import open_store
from pear_data.config import WeightSettings
from pear_data.progress import Silent
from pear_data.stages.weight import weight
from pear_data.store import Store, writable_store
from pear_data.store.sql_text import literal
from pear_data.store.views import connect

LEVELS = ("block", "token", "sequence")


@dataclass(frozen=True, slots=True)
class Question:
    """One question: what is asked, in the views' SQL and over files; {weights}, {initial}, ... list the files."""

    name: str
    views: str
    by_hand: str


SUMMARY = Question(
    "count, ESS, min, max, clip shares by source",
    """select source, count(*), sum(weight_sum) ** 2 / sum(weight_square_sum), min(weight_min), max(weight_max),
        sum(clipped_low) / sum(num_scored), sum(clipped_high) / sum(num_scored) from samples group by source""",
    """select count(*), sum(list_sum(weights)) ** 2 / sum(list_dot_product(weights, weights)),
        min(list_min(weights)), max(list_max(weights)) from read_parquet({weights})""",
)
QUANTILES = Question(
    "percentiles of weights by source",
    """select source, min(value) filter (below >= 0.05 * total), min(value) filter (below >= 0.5 * total),
        min(value) filter (below >= 0.95 * total) from (
            select source, value, sum(count) over (partition by source order by value) as below,
                sum(count) over (partition by source) as total
            from histograms where name = 'block' and quantity = 'weight'
        ) group by source""",
    "select quantile_cont(w, [0.05, 0.5, 0.95]) from (select unnest(weights) as w from read_parquet({weights}))",
)
SCAN = Question(
    "every token: mean weight and log-ratio by source",
    "select source, count(*), avg(weight), avg(log_ratio) from tokens group by source",
    """select (select avg(w) from (select unnest(weights) as w from read_parquet({weights}))),
        (select avg(d::double) from (select unnest(logprobs) as d from read_parquet({initial}))),
        (select avg(d::double) from (select unnest(logprobs) as d from read_parquet({behavior}))){spans}""",
)
TOP_TOKENS = Question(
    "top 20 tokens by mean log-ratio",
    "select token, avg(log_ratio), count(*) from tokens group by token order by 2 limit 20",
    """select (select sum(id) from (select unnest(input_ids) as id from read_parquet({corpus}))),
        (select sum(m::int) from (select unnest(loss_mask) as m from read_parquet({corpus}))),
        (select avg(d::double) from (select unnest(logprobs) as d from read_parquet({initial}))),
        (select avg(d::double) from (select unnest(logprobs) as d from read_parquet({behavior}))){spans}""",
)
LEAST_ESS = Question(
    "10 samples of least ESS/n",
    "select sample_id, ess / num_scored as share, weight_mean from samples order by share limit 10",
    """select sample_id, list_sum(weights) ** 2 / list_dot_product(weights, weights) / num_scored as share
        from read_parquet({weights}) order by share limit 10""",
)
BY_DECILE = Question(
    "weight by tenth of a sample",
    "select decile, sum(weight_sum) / sum(tokens) from deciles where name = 'block' group by decile order by decile",
    """select t * 10 // num_scored as decile, avg(w) from (
            select num_scored, unnest(range(num_scored)) as t, unnest(weights) as w from read_parquet({weights})
        ) group by decile order by decile""",
)
QUESTIONS = (SUMMARY, QUANTILES, SCAN, TOP_TOKENS, LEAST_ESS, BY_DECILE)
SPANS = ",\n        (select sum(n) from (select unnest(span_tokens) as n from read_parquet({behavior})))"


def files_of(store: Store) -> dict[str, str]:
    """SQL lists of the files that questions are asked of by hand."""
    keys = {"weights": "weights/block", "corpus": "corpus"}
    keys |= {name: f"scores/{name}" for name in ("initial", "behavior")}
    files = {
        name: f"[{', '.join(literal(str(store.path / s.file.path)) for s in store.stage(key).shards)}]"
        for name, key in keys.items()
    }
    spanned = store.stage("scores/behavior").settings.get("align") == "bytes"
    return {**files, "spans": SPANS.format(**files) if spanned else ""}


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, all in turns; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def measure(store: Store, rounds: int) -> Table:
    """The questions with their times."""
    table = Table("question", *("views ms", "by hand ms", "ratio"))
    files = files_of(store)
    with connect(store) as views, duckdb.connect() as plain:
        for question in QUESTIONS:
            by_hand = question.by_hand.format(**files)
            calls: dict[str, Callable[[], Any]] = {
                "views": lambda question=question: views.rows(question.views),
                "hand": lambda by_hand=by_hand: plain.execute(by_hand).fetchall(),
            }
            found = interleaved(calls, rounds)
            ratio = found["views"] / found["hand"]
            table.add_row(
                question.name, f"{found['views'] * 1e3:.1f}", f"{found['hand'] * 1e3:.1f}", f"{ratio:.2f}"
            )
    return table


def connecting(store: Store, rounds: int) -> float:
    """Median seconds that opening the views takes."""

    def call() -> None:
        with connect(store):
            pass

    return interleaved({"connect": call}, rounds)["connect"]


@click.command(help=__doc__)
@click.option("--store", "folder", type=click.Path(path_type=Path, file_okay=False), help="A store there is.")
@click.option(
    "--tokens", default=40_000_000, show_default=True, help="Scored tokens of the store that is made."
)
@click.option("--mean-tokens", default=1500, show_default=True, help="Its samples' mean length.")
@click.option("--shard-tokens", default=4_000_000, show_default=True, help="Tokens per shard of it.")
@click.option("--spans", is_flag=True, help="Its behavior policy has another tokenizer.")
@click.option("--rounds", default=7, show_default=True)
def main(folder: Path | None, rounds: int, **made: Any) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch, "store")
            make_store(folder, **made)
            with writable_store(folder) as store:
                for level in LEVELS:
                    weight(store, WeightSettings(level=level), Silent())
        store = open_store(folder)
        samples, tokens = store.stage("corpus").rows, store.stage("corpus").num_scored
        console = Console()
        console.print(f"{samples:,} samples, {tokens:,} scored tokens, {rounds} rounds")
        console.print(measure(store, rounds))
        console.print(f"opening the views: {connecting(store, rounds) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
