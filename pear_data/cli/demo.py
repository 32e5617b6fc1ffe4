"""`pear-data demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pear_data.cli.options import debug_option
from pear_data.errors import EXIT_OK, EXIT_QUARANTINED

if TYPE_CHECKING:
    from rich.table import Table

    from pear_data.stages.statistics import GroupStatistics, WeightingStatistics

MEANINGS = {
    "token": "one per token",
    "block": "one per 4 tokens",
    "sequence": "one per answer",
}


@click.command("demo", short_help="The whole job on bundled parts, in under a minute.")
@click.argument("folder", metavar="[DIR]", type=click.Path(path_type=Path), default=Path("pear_demo"))
@debug_option
def command(folder: Path) -> int:
    """Score, weight, report and export a bundled corpus of number puzzles under two bundled tiny models.

    The store, the export and an HTML page with the weights as a picture stay in DIR (./pear_demo). Running it again
    finds everything done.

    \b
    Examples:
      pear-data demo
      pear-data demo /tmp/pear
    """
    from rich.console import Console

    from pear_data.cli.terminal import TerminalProgress
    from pear_data.recipe import load_recipe, run_recipe
    from pear_data.stages.statistics import statistics
    from pear_data.store import open_store

    start = time.monotonic()
    overrides = {"report.out": str(folder / "report.html"), "export.out": str(folder / "export")}
    outcomes = run_recipe(load_recipe("demo", overrides=overrides), folder / "store", TerminalProgress())
    console = Console(highlight=False)
    found = statistics(open_store(folder / "store"))
    console.print(_story(found[0].corpus), soft_wrap=True)
    console.print(_table(found))
    console.print(_next_commands(folder, time.monotonic() - start), markup=False, soft_wrap=True)
    return EXIT_QUARANTINED if any(outcome.rejected for outcome in outcomes) else EXIT_OK


def _story(corpus: GroupStatistics) -> str:
    return f"""
{corpus.samples:,} right answers to number puzzles, {corpus.scored_tokens:,} tokens, written by the behavior policy
(perplexity {corpus.ppl_behavior:.2f} on them). The initial policy, which is to be trained on them, finds them less
likely (perplexity {corpus.ppl_target:.2f}). PEAR weighs each token's loss by how likely the initial policy is to go on
as the answer does. {corpus.negatives} wrong answers (label -1) are left out.
"""


def _table(found: list[WeightingStatistics]) -> Table:
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("weights")
    table.add_column("which are", no_wrap=True)
    table.add_column("mean", justify="right")
    table.add_column("9 in 10 within", justify="right")
    table.add_column("start / end", justify="right")
    table.add_column("effective", justify="right")
    for one in found:
        corpus = one.corpus
        deciles = [weight for weight in corpus.weight_by_decile if weight is not None]
        table.add_row(
            one.weights,
            MEANINGS.get(one.weights, ""),
            f"{corpus.weight_mean:.2f}",
            f"{corpus.weight_p5:.2f} to {corpus.weight_p95:.2f}",
            f"{deciles[0]:.2f} / {deciles[-1]:.2f}",
            f"{corpus.ess_ratio:.0%}",
        )
    return table


def _next_commands(folder: Path, seconds: float) -> str:
    store = f"--store {folder / 'store'}"
    return f"""
mean         above 1, training leans on text the initial policy would write too; below 1, away from what it would not
start / end  mean weight in the first and the last tenth of an answer: a token is weighed by what follows it
effective    how much of the corpus carries the training signal; 100% when all weights are equal

See every token coloured by its weight:  {folder / "report.html"}
Train on:                                {folder / "export"}   (README: "Train on it")

Try next:
  pear-data stats {store}
  pear-data show {store} "$(pear-data sql {store} --format csv 'select sample_id from samples limit 1' | tail -1)"
  pear-data sql {store} "select source, avg(weight_mean), sum(num_scored) from samples group by source"
  pear-data weight {store} --level token --gamma 0.99 --name token-g99
Your own data:
  pear-data score corpus.jsonl --model YOUR/MODEL

Done in {seconds:.0f} s."""
