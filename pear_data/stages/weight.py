"""Importance weights of a scored corpus: sidecar files per shard, as many shards at once as workers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pyarrow.parquet as pq

from pear_data.config import BASELINES, WeightSettings
from pear_data.errors import UsageError
from pear_data.progress import Outcome, Progress
from pear_data.runners.shard_workers import default_workers, run_shards
from pear_data.schema import STATUS_UNSCORED
from pear_data.stages.alignment import AlignedShard, aligned_shards
from pear_data.stages.spans import ALIGNED_BY_BYTES, spanned_policies
from pear_data.stages.weigh_shard import WeightJob, sum_log_ratios, sum_weights, weigh_shard
from pear_data.store import Store
from pear_data.store.manifest import CORPUS

Found = TypeVar("Found")

# Settings that say where the work is done, and change no weight.
_PLACEMENT = {"name", "workers", "runner", "ray_address"}


def weight(store: Store, settings: WeightSettings, progress: Progress, *, overwrite: bool = False) -> Outcome:
    """Compute one weighting for every shard that lacks it.

    Raises:
        UsageError: a policy is not scored, or its scoring is not finished; a source of `per_source` is not there.
        MismatchError: the weighting exists with other settings, or an artefact changed on disk.
        PearError: a worker was killed, the disk refused, or Ray has no room.
    """
    policies = _policies(store, settings)
    key = f"weights/{settings.stored_name}"
    shards = aligned_shards(store, [f"scores/{policy}" for policy in policies])
    _check_sources(store, settings, shards)
    stage = store.begin(key, _stage_settings(store, settings, policies), overwrite=overwrite)
    # Shards are redone below, one by one; until the last is, readers must not take the mixture for finished.
    pending = [s for s in shards if not store.is_current(key, stage.shard(s.name), s.checksums)]
    stage.complete = stage.complete and not pending
    for decision, sentence in _decisions(store, settings, policies).items():
        stage.decisions[decision] = sentence
        progress.say(f"{key}: {sentence}")
    if pending:
        jobs = _corpus_wide(store, [_job(store, shard, settings) for shard in shards], progress)
        _weigh(store, key, [job for job in jobs if job.name in {shard.name for shard in pending}], progress)
    stage.complete = True
    store.save()
    return _outcome(store, key)


def _policies(store: Store, settings: WeightSettings) -> list[str]:
    """The policies a weighting reads: a baseline does without a behavior policy that was never scored."""
    if settings.level in BASELINES and f"scores/{settings.behavior}" not in store.manifest.stages:
        return [settings.target]
    return [settings.target, settings.behavior]


def _stage_settings(store: Store, settings: WeightSettings, policies: Sequence[str]) -> dict[str, Any]:
    chosen = settings.model_dump(mode="json", exclude=_PLACEMENT)
    unused = {
        "token": ("block_by", "block_size", "block_regex"),
        "block": ("block_regex",) if settings.block_by == "tokens" else ("block_size",),
        "sequence": ("block_by", "block_size", "block_regex", "gamma"),
    }
    baseline = ("block_by", "block_size", "block_regex", "gamma", "clip_log_ratio", "clip_log_weight")
    for name in unused.get(settings.level, baseline):
        del chosen[name]
    inputs = (CORPUS, *(f"scores/{policy}" for policy in policies))
    return {**chosen, "inputs": {key: store.stage(key).fingerprint for key in inputs}}


def _check_sources(store: Store, settings: WeightSettings, shards: Sequence[AlignedShard]) -> None:
    unseen = set(settings.per_source)
    for shard in shards:
        if not unseen:
            return
        entry = shard.entries[CORPUS]
        table = pq.read_table(store.file(entry.summary or entry.file), columns=["source"])
        unseen -= set(table["source"].unique().to_pylist())
    if unseen:
        raise UsageError(
            f"per_source: no sample is of source {min(unseen)!r}: "
            "`pear-data sql 'select distinct source from samples'` lists them"
        )


def _decisions(store: Store, settings: WeightSettings, policies: Sequence[str]) -> dict[str, str]:
    decisions = {}
    if len(policies) == 1:
        decisions["log_ratios"] = (
            f"{settings.behavior} is not scored, so there are no log-ratios; {settings.level} weights need none"
        )
    elif spanned := spanned_policies(store.manifest, *policies):
        decisions[ALIGNED_BY_BYTES] = _approximate(settings, spanned)
    return decisions


def _approximate(settings: WeightSettings, spanned: list[str]) -> str:
    """What the spans of a foreign tokenizer change in a weighting, for people to read."""
    inside = {
        "token": "a weight takes an even share of its own span's log-ratio for the tokens behind it",
        "block": "a block that would end inside a span ends with the span, so blocks can be longer than asked for",
        "sequence": "sums over a sample are those of the whole text",
        "uniform": "weights do not depend on them",
        "dft": "a weight is the exponential of its token's share of a span's log-prob",
    }
    return (
        f"{', '.join(spanned)} reads the text with another tokenizer: log-ratios are exact over spans on which both "
        f"agree and spread evenly inside them, where clips apply per token; {inside[settings.level]}"
    )


def _job(store: Store, shard: AlignedShard, settings: WeightSettings) -> WeightJob:
    needs_text = settings.level == "block" and settings.block_by != "tokens"
    return WeightJob(
        root=store.path,
        name=shard.name,
        settings=settings,
        corpus=shard.entries[CORPUS],
        target=shard.entries[f"scores/{settings.target}"],
        behavior=shard.entries.get(f"scores/{settings.behavior}"),
        manifest=store.manifest.model_copy(update={"stages": {}}) if needs_text else None,
    )


def _corpus_wide(store: Store, jobs: list[WeightJob], progress: Progress) -> list[WeightJob]:
    """The jobs with what they need to know of all shards: the mean log-ratio, the mean weight."""
    settings = jobs[0].settings
    decisions = store.stage(f"weights/{settings.stored_name}").decisions
    if settings.center == "corpus":
        center = _mean(sum_log_ratios, jobs, store, progress, "log-ratio")
        decisions["center"] = center
        jobs = [replace(job, center=center) for job in jobs]
    if settings.normalize == "corpus":
        mean = _mean(sum_weights, jobs, store, progress, "weight")
        if mean <= 0:
            raise UsageError("normalize corpus: no positive sample has a weight to take the mean of")
        decisions["scale"] = 1 / mean
        jobs = [replace(job, scale=1 / mean) for job in jobs]
    return jobs


def _mean(
    summed: Callable[[WeightJob], tuple[float, int]],
    jobs: Sequence[WeightJob],
    store: Store,
    progress: Progress,
    what: str,
) -> float:
    total, tokens = 0.0, 0
    progress.begin(f"mean {what}", len(jobs), "shards")
    found = []
    with contextlib.closing(_shards(summed, jobs, store)) as parts:
        for part in parts:
            found.append(part)
            progress.advance(1)
    progress.end()
    # Sorted, so that the sum does not depend on which worker was first.
    for total_part, count in sorted(found):
        total, tokens = total + total_part, tokens + count
    mean = total / tokens if tokens else 0.0
    progress.say(f"mean {what} of {tokens:,} scored tokens: {mean:.6g}")
    return mean


def _shards(
    work: Callable[[WeightJob], Found], jobs: Sequence[WeightJob], store: Store
) -> Generator[Found, None, None]:
    settings = jobs[0].settings
    tokens = sum(job.target.num_scored for job in jobs)
    workers = settings.workers or (
        default_workers(len(jobs), tokens) if settings.runner == "local" else len(jobs)
    )
    return run_shards(
        work,
        jobs,
        workers=workers,
        runner=settings.runner,
        ray_address=settings.ray_address,
        root=store.path,
    )


def _weigh(store: Store, key: str, jobs: Sequence[WeightJob], progress: Progress) -> None:
    progress.begin(key, sum(job.target.num_scored for job in jobs), "tokens")
    tokens = {job.name: job.target.num_scored for job in jobs}
    try:
        with contextlib.closing(_shards(weigh_shard, jobs, store)) as entries:
            for entry in entries:
                store.commit(key, entry)
                progress.advance(tokens[entry.name])
                progress.shard(entry.name, f"{entry.rows} samples")
    finally:
        progress.end()


def _outcome(store: Store, key: str) -> Outcome:
    stage = store.stage(key)
    statuses: Counter[str] = Counter()
    for shard in stage.shards:
        statuses.update(shard.counts)
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items()))
    summary = f"{key}: {stage.num_scored:,} weighted tokens in {stage.rows:,} samples ({counts})"
    return Outcome(summary, rejected=statuses.get(STATUS_UNSCORED, 0))
