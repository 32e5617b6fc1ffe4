"""`pear-data export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pear_data.cli.options import build, common_options, finish, settings_options
from pear_data.config import ExportSettings


@click.command("export", short_help="Write a weighted dataset for a trainer.")
@click.argument("out")
@settings_options(
    ExportSettings,
    "weights",
    "format",
    "max_length",
    "eval_fraction",
    "where",
    "live",
    "behavior",
    "shard_tokens",
    "check",
)
@common_options
def command(store: Path, out: str, **options: Any) -> int:
    """Write the corpus with its weights to OUT, a new directory, and read it again.

    \b
    hf         Parquet: input_ids, attention_mask, labels, loss_weights. transformers, TRL, Axolotl, own loops
    hf-packed  the same in packs of --max-length tokens, with position_ids and seq_lengths. transformers, TRL
    verl       Parquet for pear_data.hooks.verl.PearVerlDataset
    swift      JSON lines of token ids with a loss_scale each, for ms-swift
    shifted    JSON lines, each weight one place to the left: Tinker; Levanter, with --max-length
    messages   JSON lines of conversations, one weight each: LLaMA-Factory v1, NeMo-RL (sequence-level weightings)

    What to do with it in each trainer is in pear_data/hooks/, a page a trainer. In --where, columns that name no
    weighting are those of --weights.

    \b
    Examples:
      pear-data export out/
      pear-data export out/ --weights token --eval-fraction 0.02
      pear-data export math/ --where "source = 'math' and ess / num_scored > 0.2"
      pear-data export live/ --live
      pear-data export packs/ --format hf-packed --max-length 8192
      pear-data export for-verl/ --format verl --max-length 8192
      pear-data export for-ms-swift/ --format swift
      pear-data export for-levanter/ --format shifted --max-length 4096
      pear-data export for-llama-factory/ --format messages --weights sequence
      pear-data export out/ --check
    """
    from pear_data.cli.terminal import TerminalProgress
    from pear_data.stages.export import check_export, export
    from pear_data.store import open_store

    settings = build(ExportSettings, {"out": out, **options})
    if settings.check:  # an export may be where its store is not
        return finish(check_export(Path(out), TerminalProgress()))
    return finish(export(open_store(store), settings, TerminalProgress()))
