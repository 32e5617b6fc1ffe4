"""Reading a corpus and tokenizing it, once, into the store."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pear_data.chat.template import read_template
from pear_data.chat.tokenization import RAW, ChatTokenizer
from pear_data.chat.tokenizers import load_tokenizer, tokenizer_fingerprint
from pear_data.config import IngestSettings
from pear_data.corpus.duplicates import check_unique_ids
from pear_data.corpus.examples import Plan, plan_input
from pear_data.corpus.inputs import Input, opened_inputs, sha256_of
from pear_data.corpus.records import Rejected
from pear_data.corpus.stored_tokenizer import store_tokenizer
from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.progress import Outcome, Progress
from pear_data.resources import resolve
from pear_data.stages.ingest_batches import BATCH_BYTES, ROWS, Batch, tokenized_batches
from pear_data.stages.ingest_shard import shard_writer
from pear_data.stages.logged import logged
from pear_data.store import Store
from pear_data.store.manifest import CORPUS, Cursor, Stage

_SHOWN_INPUTS = 3
DATE = "chat_template_date"
DESCRIBED = "inputs"
CONTENT_SETTINGS = (
    "turns",
    "prompt_field",
    "response_field",
    "id_field",
    "source_field",
    "label_field",
    "limit",
    "shard_tokens",
    "trust_remote_code",
)


def ingest(store: Store, settings: IngestSettings, progress: Progress) -> Outcome:
    """Tokenize a corpus into the store; the caller holds the writer's lock.

    The same corpus given again goes on behind the last whole shard, or has nothing to do.

    Raises:
        UsageError: no such file, no layout recognised, or a choice is missing (a split, `turns`).
        MismatchError: the store holds another corpus, or this one made with other settings.
        PearError: a file is damaged, an id occurs twice, too many rows are rejected, or the disk refused.
    """
    return logged(store, [CORPUS], progress, lambda progress: _ingest(store, settings, progress))


def _ingest(store: Store, settings: IngestSettings, progress: Progress) -> Outcome:
    if (settings.prompt_field is None) != (settings.response_field is None):
        raise UsageError("--prompt-field and --response-field go together: give both")
    tokenizer = load_tokenizer(
        resolve(settings.tokenizer),
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    with opened_inputs([resolve(given) for given in settings.corpus], store.path) as inputs:
        hashed = _hashed(inputs, progress)
        vocabulary_size = max(tokenizer.get_vocab().values()) + 1
        plans = [plan_input(source, settings, vocabulary_size) for source in inputs]
        today = _date(store)
        chat = _chat_tokenizer(tokenizer, plans, settings, today)
        made_by = {
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "chat_template": chat.template_fingerprint() if chat else RAW,
        }
        dated = {DATE: today.isoformat()} if chat and chat.writes_date else {}
        stage = store.begin(
            CORPUS,
            {"inputs": hashed, **made_by, **dated, **settings.model_dump(include=set(CONTENT_SETTINGS))},
        )
        store_tokenizer(store, tokenizer, settings.tokenizer, *made_by.values())
        whole = _all_whole(store, stage, progress)
        _check_rejected(stage.quarantined, settings.max_bad)
        if whole:
            progress.say(f"the corpus in {store.path} is complete already")
        else:
            stage.decisions = _decisions(plans, chat, dated)
            _say_decisions(plans, stage, progress)
            _write_shards(store, stage, _batches(stage, plans, chat, settings), settings, progress)
            _finish(store, stage, progress)
    return _outcome(stage)


def _hashed(inputs: Sequence[Input], progress: Progress) -> list[dict[str, Any]]:
    """Name, size and checksum of each input: what tells one corpus from another, wherever it lies."""
    sizes = [source.path.stat().st_size for source in inputs]
    progress.begin("checksums of the corpus", sum(sizes), "bytes")
    try:
        return [
            {"name": source.name, "bytes": size, "sha256": sha256_of(source.path, progress.advance)}
            for source, size in zip(inputs, sizes, strict=True)
        ]
    finally:
        progress.end()


def _date(store: Store) -> date:
    """The date for chat templates that write one: that of the day this corpus was begun, else today's."""
    begun = store.manifest.stages.get(CORPUS)
    stored = begun.settings.get(DATE) if begun is not None and begun.shards else None
    return date.today() if stored is None else date.fromisoformat(stored)


def _chat_tokenizer(
    tokenizer: PreTrainedTokenizerBase, plans: Sequence[Plan], settings: IngestSettings, today: date
) -> ChatTokenizer | None:
    """None where every input comes tokenized. Without a chat template of its own or given, a tokenizer reads
    prompts and responses as raw text."""
    texts = [plan.layout for plan in plans if plan.layout and not plan.layout.stored]
    if not texts:
        return None
    template = settings.chat_template
    if template is None and not tokenizer.chat_template and all(layout.paired for layout in texts):
        template = RAW
    elif template not in (None, RAW):
        template = read_template(Path(template))
    chat = ChatTokenizer(tokenizer, template, settings.turns, today)
    if template is not None:
        # What is stored is the tokenizer as used here.
        tokenizer.chat_template = None if template == RAW else template
    return chat


def _all_whole(store: Store, stage: Stage, progress: Progress) -> bool:
    """Whether nothing is left to do; from the first damaged shard on, all are dropped, to be made again."""
    for index, shard in enumerate(stage.shards):
        try:
            for file in shard.files:
                store.file(file)
        except MismatchError as error:
            progress.say(f"{str(error).partition(':')[0]}: making the corpus again from {shard.name} on")
            if any(lost.mended for lost in stage.shards[index:]):
                progress.say(
                    "rows mended there are in quarantine again: give them to `pear-data quarantine retry` again"
                )
            stage.shards = stage.shards[:index]
            stage.complete = False
            store.save()
            break
    return stage.complete


def _decisions(plans: Sequence[Plan], chat: ChatTokenizer | None, dated: dict[str, str]) -> dict[str, Any]:
    return {
        DESCRIBED: {plan.input.name: plan.describe() for plan in plans},
        "scored_spans": chat.span_source if chat else "as given with the token ids",
        **dated,
    }


def _say_decisions(plans: Sequence[Plan], stage: Stage, progress: Progress) -> None:
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for plan in plans:
        alike[plan.describe()].append(plan.input.name)
    for description, names in alike.items():
        more = f" and {len(names) - _SHOWN_INPUTS} more" if len(names) > _SHOWN_INPUTS else ""
        progress.say(f"{', '.join(names[:_SHOWN_INPUTS])}{more}: {description}")
    progress.say(f"scored spans: {stage.decisions['scored_spans']}")
    if DATE in stage.decisions:
        progress.say(
            f"date written by the chat template: {stage.decisions[DATE]}, also when this is resumed later"
        )
    if stage.shards:
        progress.say(f"going on behind {stage.shards[-1].name}, {stage.rows:,} samples are there")


def _batches(
    stage: Stage, plans: Sequence[Plan], chat: ChatTokenizer | None, settings: IngestSettings
) -> Iterator[Batch]:
    """The batches behind the last shard. None has more bytes of text than a shard has tokens, so that no shard
    gets much larger than asked for."""
    start = (stage.shards[-1].cursor if stage.shards else None) or Cursor(input=0, row=0)
    left = None if settings.limit is None else settings.limit - _counts(stage)[ROWS]
    return tokenized_batches(plans, chat, start, left, min(BATCH_BYTES, settings.shard_tokens))


def _write_shards(
    store: Store, stage: Stage, batches: Iterator[Batch], settings: IngestSettings, progress: Progress
) -> None:
    progress.begin(CORPUS, None, "tokens", done=sum(shard.num_tokens for shard in stage.shards))
    try:
        batch = next(batches, None)
        while batch is not None:
            start = time.monotonic()
            name = f"part-{len(stage.shards):05d}"
            with shard_writer(store, name) as writer:
                # Rows rejected behind a full shard stay with it: no shard is without samples.
                while batch is not None and not (
                    batch.samples and writer.num_tokens >= settings.shard_tokens
                ):
                    writer.add(batch)
                    _check_rejected(stage.quarantined + writer.quarantined, settings.max_bad, batch.rejected)
                    progress.advance(batch.num_tokens)
                    batch = next(batches, None)
                if not writer.num_samples:
                    raise PearError(
                        f"the corpus has no usable row ({writer.first_rejected}): give JSON Lines (one object a line), "
                        "Parquet or a saved dataset"
                    )
            store.commit(CORPUS, writer.entry())
            note = f"{writer.num_samples:,} samples, {writer.quarantined:,} rows quarantined"
            progress.shard(name, note, seconds=time.monotonic() - start)
            if writer.quarantined:
                progress.say(
                    f"{name}: {writer.quarantined:,} rows quarantined, the first {writer.first_rejected}"
                )
    finally:
        progress.end()


def _check_rejected(bad: int, max_bad: int | None, latest: Sequence[tuple[str, Rejected]] = ()) -> None:
    """Stop at the first row too many, which is one of the `latest`, or is in the store already."""
    if max_bad is None or bad <= max_bad:
        return
    name, row = latest[max_bad - bad] if len(latest) >= bad - max_bad else (None, None)
    where = (
        f"; the last is {name}:{row.number}: {row.reason}"
        if row
        else " (`pear-data quarantine list` shows them)"
    )
    count = max_bad + 1 if row else bad
    raise PearError(f"{count:,} rows rejected, more than --max-bad {max_bad} allows{where}")


def _finish(store: Store, stage: Stage, progress: Progress) -> None:
    if not stage.shards:
        names = ", ".join(source["name"] for source in stage.settings["inputs"][:_SHOWN_INPUTS])
        raise PearError(f"the corpus has no rows (read: {names}): give files that hold some")
    check_unique_ids(store, stage.shards)
    counts = total_counts(stage)
    stage.decisions["counts"] = counts
    for what, count in counts.items():
        progress.say(f"{count:,} {what}")
    stage.complete = True
    for other in store.manifest.stages.values():
        # A shard of mended rows may have been lost.
        other.shards = [shard for shard in other.shards if stage.shard(shard.name)]
    store.save()


def total_counts(stage: Stage) -> dict[str, int]:
    """What was read, passed over and decided in a whole corpus."""
    return {what: count for what, count in sorted(_counts(stage).items()) if count}


def _counts(stage: Stage) -> Counter[str]:
    return sum((Counter(shard.counts) for shard in stage.shards), Counter())


def _outcome(stage: Stage) -> Outcome:
    tokens = sum(shard.num_tokens for shard in stage.shards)
    rejected = stage.quarantined
    set_aside = f", {rejected:,} rows in quarantine (`pear-data quarantine list`)" if rejected else ""
    return Outcome(
        f"corpus: {stage.rows:,} samples of {tokens:,} tokens, {stage.num_scored:,} of them scored{set_aside}",
        rejected,
    )
