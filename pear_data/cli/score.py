"""`pear-data score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pear_data.cli.ingest import INGEST_OPTIONS
from pear_data.cli.options import build, common_options, finish, settings_options
from pear_data.config import INITIAL, IngestSettings, ScoreSettings
from pear_data.errors import EXIT_OK, UsageError

if TYPE_CHECKING:
    from pear_data.progress import Progress
    from pear_data.store import Store

_SHARED = ("revision", "trust_remote_code")


@click.command("score", short_help="Log-probs of the scored tokens under one policy.")
@click.argument("corpus", nargs=-1)
@settings_options(ScoreSettings)
@settings_options(IngestSettings, "tokenizer", *(name for name in INGEST_OPTIONS if name not in _SHARED))
@click.option("--overwrite", is_flag=True, help="Score again a policy scored with other settings.")
@click.option(
    "--dry-run", is_flag=True, help="Say what it would take; the store is read, nothing is written."
)
@common_options
def command(store: Path, corpus: tuple[str, ...], overwrite: bool, dry_run: bool, **options: Any) -> int:
    """Score the store's corpus under a policy; with CORPUS, ingest that first.

    The tokenizer is the initial policy's; both policies score the same ids. A killed run resumes by itself when
    the same command is given again.

    \b
    Examples:
      pear-data score corpus.jsonl --model Qwen/Qwen2.5-7B-Instruct
      pear-data score --policy behavior --model Qwen/Qwen2.5-32B-Instruct --engine vllm
      pear-data score --policy behavior --from-field logprobs
      pear-data score --model Qwen/Qwen2.5-7B-Instruct --dry-run
      pear-data score --model Qwen/Qwen2.5-7B-Instruct --audit 16
    """
    from pear_data.cli.terminal import TerminalProgress
    from pear_data.store import writable_store

    settings = build(ScoreSettings, {name: options[name] for name in ScoreSettings.model_fields})
    progress = TerminalProgress()
    if dry_run:
        _print_plan(store, corpus, settings, overwrite, progress)
        return EXIT_OK
    outcomes = []
    with writable_store(store, create=bool(corpus)) as opened:
        # Only now, so that a second writer leaves before it has loaded torch.
        from pear_data.stages.ingest import ingest
        from pear_data.stages.score import score_policy

        if corpus:
            outcomes.append(ingest(opened, _ingest_settings(opened, corpus, settings, options), progress))
        outcomes.append(score_policy(opened, settings, progress, overwrite=overwrite))
        if settings.audit:
            from pear_data.stages.audit import audit_policy

            outcomes.append(audit_policy(opened, settings, progress))
    return finish(*outcomes)


def _print_plan(
    folder: Path, corpus: tuple[str, ...], settings: ScoreSettings, overwrite: bool, progress: Progress
) -> None:
    import shlex
    import sys

    from rich.console import Console

    from pear_data.store import open_store
    from pear_data.store.manifest import CORPUS, MANIFEST_NAME

    if not (folder / MANIFEST_NAME).exists():
        tokenizer = settings.model if settings.policy == INITIAL and settings.model else "M"
        ingest = ["ingest", *(corpus or ["CORPUS"]), "--tokenizer", tokenizer, "--store", str(folder)]
        raise UsageError(f"{folder} holds no corpus to plan for: run `pear-data {shlex.join(ingest)}`")
    opened = open_store(folder)
    opened.complete_stage(CORPUS)
    if corpus:
        progress.say(f"Planning for the corpus in {folder}; {', '.join(corpus)} is not read.")
    from pear_data.stages.plan import plan_scoring
    from pear_data.stages.plan_text import plan_table
    from pear_data.stages.sql import UNLIMITED_WIDTH

    plan = plan_scoring(opened, settings, progress)
    if settings.align == "bytes":
        progress.say(
            "Tokens are counted as the corpus has them; this model's tokenizer makes more or fewer of them."
        )
    if plan.differences and not overwrite:
        progress.say(
            f"scores/{settings.policy} has other settings ({'; '.join(plan.differences)}): scoring needs another "
            "--policy, or --overwrite"
        )
    width = None if sys.stdout.isatty() else UNLIMITED_WIDTH
    Console(markup=False, highlight=False, emoji=False, width=width).print(plan_table(plan))


def _ingest_settings(
    store: Store, corpus: tuple[str, ...], settings: ScoreSettings, options: dict[str, Any]
) -> IngestSettings:
    values = {name: options[name] for name in IngestSettings.model_fields if name in options}
    known = store.manifest.tokenizer
    if values["tokenizer"] is None and settings.policy == INITIAL and settings.model is not None:
        values["tokenizer"] = settings.model
    elif values["tokenizer"] is None and known is not None:
        values |= {"tokenizer": known.name, "revision": None}
    if values["tokenizer"] is None:
        raise UsageError("give --tokenizer, the initial policy's: the corpus is tokenized once, with it")
    return build(IngestSettings, {"corpus": list(corpus), **values})
