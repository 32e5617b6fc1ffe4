"""Log-probs of a corpus's scored tokens under one policy, one file per shard, as many shards at once as workers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from pear_data.config import ScoreSettings
from pear_data.errors import PearError
from pear_data.progress import OneAtATime, Outcome, Progress
from pear_data.schema import STATUS_OK
from pear_data.stages.logged import Timed, logged
from pear_data.stages.opened_source import open_source
from pear_data.stages.score_shard import Failure, score_shard
from pear_data.stages.sources import SHOWN_REASONS, PolicySource
from pear_data.store import Store
from pear_data.store.manifest import CORPUS, Shard
from pear_data.tokens import TokenBatch


def score(
    store: Store,
    settings: ScoreSettings,
    source: PolicySource,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Outcome:
    """Score every shard that lacks this policy's log-probs. After an error `source` is closed.

    Raises:
        UsageError: the corpus is not ingested completely.
        MismatchError: the policy was scored with other settings, or would be given other token ids than the
            corpus holds.
        PearError: the source fails, or the disk refuses.
    """
    corpus = store.complete_stage(CORPUS)
    key = f"scores/{settings.policy}"
    stage_settings = {**source.settings, "inputs": {CORPUS: corpus.fingerprint}}
    stage = store.begin(key, stage_settings, overwrite=overwrite)
    stage.decisions |= source.decisions
    pending = [
        shard
        for shard in corpus.shards
        if not store.is_current(key, stage.shard(shard.name), {CORPUS: shard.file.sha256})
    ]
    stage.complete = stage.complete and not pending
    total = sum(shard.num_tokens for shard in corpus.shards)
    progress = OneAtATime(progress)
    progress.begin(key, total, "tokens", done=total - sum(shard.num_tokens for shard in pending))
    try:
        _score_shards(store, key, pending, source, progress)
    finally:
        progress.end()
    stage.complete = True
    store.save()
    return scores_outcome(store, key, resumed=len(corpus.shards) - len(pending))


def score_policy(
    store: Store, settings: ScoreSettings, progress: Progress, *, overwrite: bool = False
) -> Outcome:
    """Open the source that `settings` ask for and `score` with it.

    Raises:
        PearError: the model cannot be loaded.
        UsageError, MismatchError: as `open_source` and `score`.
    """
    store.complete_stage(CORPUS)

    def work(progress: Progress) -> Outcome:
        with open_source(store, settings, progress) as source:
            return score(store, settings, source, progress, overwrite=overwrite)

    return logged(store, [f"scores/{settings.policy}"], progress, work)


def _score_shards(
    store: Store, key: str, pending: Sequence[Shard], source: PolicySource, progress: Progress
) -> None:
    """Each worker's thread reads and writes shards of its own; only this thread enters them in the manifest."""
    stopping = threading.Event()
    source = replace(source, check_batch=_guarded(source.check_batch, stopping))
    with ThreadPoolExecutor(source.workers) as threads:
        timed = Timed(score_shard)
        scoring = [threads.submit(timed, store, key, shard, source, progress) for shard in pending]
        try:
            for scored in as_completed(scoring):
                took = scored.result()
                entry, failures = took.result
                store.commit(key, entry)
                note = f"{entry.rows} samples, {entry.num_scored} scored tokens"
                progress.shard(entry.name, note, seconds=took.seconds)
                say_failures(entry, failures, progress)
        except BaseException:
            # Or the threads would score on to the end of their shards.
            stopping.set()
            source.close()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _guarded(check: Callable[[TokenBatch], None], stopping: threading.Event) -> Callable[[TokenBatch], None]:
    """`check` for several threads, because a tokenizer bears one at a time; it lets no batch pass when `stopping`."""
    checking = threading.Lock()

    def guarded(batch: TokenBatch) -> None:
        with checking:
            if stopping.is_set():
                raise PearError("scoring was stopped")
            check(batch)

    return guarded


def say_failures(entry: Shard, failures: Sequence[Failure], progress: Progress) -> None:
    for failure in failures[:SHOWN_REASONS]:
        progress.say(f"{failure.sample_id} cannot be scored and is quarantined: {failure.reason}")
    if len(failures) > SHOWN_REASONS:
        progress.say(f"{len(failures) - SHOWN_REASONS} more samples of {entry.name} are quarantined")


def scores_outcome(store: Store, key: str, resumed: int = 0) -> Outcome:
    """What a policy's scores are now."""
    stage = store.stage(key)
    statuses: Counter[str] = Counter()
    for shard in stage.shards:
        statuses.update(shard.counts)
    rejected = sum(count for status, count in statuses.items() if status != STATUS_OK)
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items()))
    quarantined = sum(shard.quarantined for shard in stage.shards)
    set_aside = f"; {quarantined:,} in quarantine (`pear-data quarantine list`)" if quarantined else ""
    earlier = f"; {resumed} of {len(stage.shards)} shards were there already" if resumed else ""
    return Outcome(
        f"{key}: {stage.num_scored:,} scored tokens in {stage.rows:,} samples ({counts}){set_aside}{earlier}",
        rejected,
    )
