"""`pear-data ingest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pear_data.cli.options import build, common_options, finish, settings_options
from pear_data.config import IngestSettings

INGEST_OPTIONS = tuple(name for name in IngestSettings.model_fields if name not in ("corpus", "tokenizer"))


@click.command("ingest", short_help="Read a corpus and tokenize it once.")
@click.argument("corpus", nargs=-1, required=True)
@settings_options(IngestSettings, "tokenizer", *INGEST_OPTIONS)
@common_options
def command(store: Path, corpus: tuple[str, ...], **options: Any) -> int:
    """Read CORPUS (JSONL, .gz, .zst, '-', Parquet, saved datasets) and tokenize it with the initial policy's
    tokenizer and chat template. The layout is recognised and said; rows that do not fit are quarantined.

    \b
    Examples:
      pear-data ingest corpus.jsonl --tokenizer Qwen/Qwen2.5-7B-Instruct
      pear-data ingest part-*.parquet --tokenizer ./model --source-field dataset
      zcat big.gz | pear-data ingest - --tokenizer ./model --turns last
    """
    if options["tokenizer"] is None:
        raise click.UsageError("give --tokenizer, the initial policy's")
    settings = build(IngestSettings, {"corpus": list(corpus), **options})
    from pear_data.cli.terminal import TerminalProgress
    from pear_data.stages.ingest import ingest
    from pear_data.store import writable_store

    with writable_store(store, create=True) as opened:
        return finish(ingest(opened, settings, TerminalProgress()))
