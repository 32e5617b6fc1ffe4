"""`pear-data quarantine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pear_data.cli.options import build, common_options, finish, settings_options
from pear_data.cli.rows_out import rows_options, write_out
from pear_data.config import ScoreSettings
from pear_data.errors import UsageError
from pear_data.progress import Outcome

_SCORING = tuple(name for name in ScoreSettings.model_fields if name not in ("audit", "from_field"))


@click.group("quarantine", short_help="What was set aside, with its reasons; and once more.")
def command() -> None:
    """Look at rows that were rejected at ingest and samples that could not be scored, and try them again.

    \b
    Examples:
      pear-data quarantine list
      pear-data quarantine retry mended.jsonl
    """


@command.command("list")
@click.option("--stage", help="Only this stage's: corpus, or scores/POLICY.")
@rows_options("PEAR_QUARANTINE_LIST_FORMAT")
@common_options
def list_rows(store: Path, stage: str | None, chosen: str | None, output: Path | None) -> None:
    """List the rows in quarantine: stage, input, row (from 1), sample_id, reason and the raw row.

    Raw bytes that are not UTF-8 stand in raw_base64; Parquet holds all as bytes. Of a row no more than the first
    64 KiB are kept; the reason then tells its size.

    \b
    Examples:
      pear-data quarantine list
      pear-data quarantine list --stage scores/behavior --format csv
      pear-data quarantine list --stage corpus -o mended.jsonl
    """
    from pear_data.stages.quarantine import write_quarantine
    from pear_data.store import open_store

    opened = open_store(store)
    click.echo(
        write_out(chosen, output, lambda form, sink: write_quarantine(opened, form, sink, stage=stage)),
        err=True,
    )


@command.command("retry")
@click.argument("mended", required=False, type=click.Path(path_type=Path, dir_okay=False))
@settings_options(ScoreSettings, *_SCORING)
@common_options
def retry(store: Path, mended: Path | None, **options: Any) -> int:
    """Take rows mended in MENDED into the corpus; without MENDED, score a policy's failed samples again.

    MENDED holds lines as `quarantine list -o` writes them, whose `raw` you have mended: JSON in a string, or the object
    itself. Rows that fit now become a new shard of the corpus; `score` and `weight`, given again, do that alone. The
    others stay where they are (exit code 3).

    Without MENDED give the policy and the options it was scored with. Samples of status failed or nonfinite are scored
    again, all others are kept; `weight`, given again, redoes the shards that changed.

    \b
    Examples:
      pear-data quarantine retry mended.jsonl
      pear-data quarantine retry --policy behavior --model Qwen/Qwen2.5-32B-Instruct
    """
    from pear_data.store import writable_store

    settings = build(ScoreSettings, options)
    if mended is None and settings.model is None:
        raise UsageError(
            "give a file of mended rows, or --model M (and --policy P) to score failed samples again"
        )
    if mended is not None and settings.model is not None:
        raise UsageError("a file of mended rows and --model exclude each other: give one")
    with writable_store(store) as opened:
        return finish(_retried(opened, mended, settings))


def _retried(store: Any, mended: Path | None, settings: ScoreSettings) -> Outcome:
    from pear_data.cli.terminal import TerminalProgress
    from pear_data.stages.logged import logged
    from pear_data.store.manifest import CORPUS

    if mended is None:
        from pear_data.stages.rescore import rescore_policy

        key = f"scores/{settings.policy}"
        return logged(
            store, [key], TerminalProgress(), lambda progress: rescore_policy(store, settings, progress)
        )
    from pear_data.stages.mend import mend

    trusted = settings.trust_remote_code
    return logged(
        store,
        [CORPUS],
        TerminalProgress(),
        lambda progress: mend(store, mended, progress, trust_remote_code=trusted),
    )
