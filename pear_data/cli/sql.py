"""`pear-data sql`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pear_data.cli.options import common_options
from pear_data.cli.rows_out import rows_options, write_out


@click.command("sql", short_help="Query the store with SQL.")
@click.argument("query")
@rows_options("PEAR_SQL_FORMAT")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True, help="Seconds."
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0.125),
    help="GiB of buffers, beyond which a query spills to disk; by default 80 % of what there is.",
)
@common_options
def command(
    store: Path, query: str, chosen: str | None, output: Path | None, timeout: float, memory: float | None
) -> None:
    """Run one read-only DuckDB query over the store; `-` reads it from standard input.

    A query cannot change the store or a setting, nor read another file or the network, and is bounded in time, memory
    and scratch space. That guards against a pasted query; it is no sandbox for people who may not read the store.

    \b
    Views:
      corpus   sample_id, source, label, input_ids, loss_mask, num_tokens, num_scored, record
      scores   policy, sample_id, logprobs, span_tokens, num_scored, logprob_sum, status
      weights  name, sample_id, weights, num_scored, weight_mean, ess, clipped_low, saturated_low, ..., status
      samples  a row per sample: source, counts, perplexity_<policy>, weight_mean, ess, weight_mean_<name>, ...
      tokens   a row per scored token: position, t, token, logprob_<policy>, log_ratio, weight, weight_<name>, ...
      histograms  name, source, quantity (log_ratio, weight or sample_weight), value, count: a row per bin
      deciles  name, source, decile (1 to 10, of a sample's tokens), tokens, weight_sum, clipped_low, ...
    In samples and tokens, columns that name no weighting are those of "block" if there is one, else of the first.
    samples, histograms and deciles read no token, and answer at once. Histograms and deciles count samples of label 1.

    \b
    Examples:
      pear-data sql "select source, avg(weight_mean), sum(num_scored) from samples group by source"
      pear-data sql "select token, avg(log_ratio) from tokens group by token order by 2 limit 20"
      pear-data sql "select name, decile, sum(weight_sum) / sum(tokens) from deciles group by all order by all"
      pear-data sql "describe tokens"
      pear-data sql "from samples" -o samples.parquet
    """
    from pear_data.stages.sql import write_query
    from pear_data.store import open_store

    text = sys.stdin.read() if query == "-" else query
    opened = open_store(store)
    note = write_out(
        chosen,
        output,
        lambda form, sink: write_query(
            opened,
            text,
            form,
            sink,
            timeout=timeout,
            memory=None if memory is None else int(memory * 2**30),
        ),
    )
    if note:
        click.echo(note, err=True)
