"""Importance weights of a scored corpus: sidecar files per shard, as many shards at once as workers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pear_data.config import BASELINES, WeightSettings
from pear_data.errors import UsageError
from pear_data.progress import Outcome, Progress
from pear_data.runners.shard_workers import default_workers, run_shards
from pear_data.schema import STATUS_UNSCORED
from pear_data.stages.alignment import AlignedShard, aligned_shards
from pear_data.stages.logged import Timed, logged
from pear_data.stages.spans import ALIGNED_BY_BYTES, spanned_policies
from pear_data.stages.text_blocks import open_block_cutter
from pear_data.stages.weigh_shard import sum_log_ratios, sum_weights, weigh_shard
from pear_data.stages.weight_job import Weighting, WeightJob
from pear_data.store import Store
from pear_data.store.columns import read_columns
from pear_data.store.manifest import CORPUS, Stage

Found = TypeVar("Found")

# Settings that say where the work is done, and change no weight.
_PLACEMENT = {"name", "workers", "runner", "ray_address"}


def weight(store: Store, settings: WeightSettings, progress: Progress, *, overwrite: bool = False) -> Outcome:
    """Compute one weighting for every shard that lacks it; see `weight_all`."""
    (outcome,) = weight_all(store, [settings], progress, overwrite=overwrite)
    return outcome


def weight_all(
    store: Store, weightings: Sequence[WeightSettings], progress: Progress, *, overwrite: bool = False
) -> list[Outcome]:
    """Compute several weightings of the same two policies, each for every shard that lacks it, reading log-probs once.

    Raises:
        UsageError: a policy is not scored, or its scoring is not finished; a source of `per_source` is not there.
        MismatchError: a weighting exists with other settings, or an artefact changed on disk.
        PearError: a worker was killed, the disk refused, or Ray has no room.
    """

    def work(progress: Progress) -> list[Outcome]:
        try:
            return _weight_all(store, weightings, progress, overwrite)
        except BaseException:
            _forget_empty(store, weightings)
            raise

    return logged(store, [f"weights/{settings.stored_name}" for settings in weightings], progress, work)


def _weight_all(
    store: Store, weightings: Sequence[WeightSettings], progress: Progress, overwrite: bool
) -> list[Outcome]:
    policies = _policies(store, weightings)
    shards = aligned_shards(store, [f"scores/{policy}" for policy in policies])
    begun = [_begun(store, settings, policies, shards, overwrite) for settings in weightings]
    pending: dict[str, set[str]] = {}
    for settings, stage in zip(weightings, begun, strict=True):
        key = f"weights/{settings.stored_name}"
        # Shards are redone below, one by one; until the last is, readers must not take the mixture for finished.
        pending[key] = {s.name for s in shards if not store.is_current(key, stage.shard(s.name), s.checksums)}
        stage.complete = stage.complete and not pending[key]
        for decision, sentence in _decisions(store, settings, policies).items():
            stage.decisions[decision] = sentence
            progress.say(f"{key}: {sentence}")
    jobs = [_job(store, shard, weightings[0]) for shard in shards]
    made = [
        _corpus_wide(store, jobs, settings, progress)
        for settings in weightings
        if pending[f"weights/{settings.stored_name}"]
    ]
    wanted = [
        replace(job, weightings=tuple(one for one in made if job.name in pending[one.key])) for job in jobs
    ]
    _weigh(store, [job for job in wanted if job.weightings], weightings[0], progress)
    for stage in begun:
        stage.complete = True
    store.save()
    return [_outcome(store, f"weights/{settings.stored_name}") for settings in weightings]


def _forget_empty(store: Store, weightings: Sequence[WeightSettings]) -> None:
    """What failed before its first shard leaves nothing that others would take for weights to come."""
    stages = store.manifest.stages
    empty = [key for key in (f"weights/{settings.stored_name}" for settings in weightings) if key in stages]
    empty = [key for key in empty if not stages[key].shards]
    for key in empty:
        del stages[key]
    if empty:
        store.save()


def _begun(
    store: Store,
    settings: WeightSettings,
    policies: Sequence[str],
    shards: Sequence[AlignedShard],
    overwrite: bool,
) -> Stage:
    _check_sources(store, settings, shards)
    key = f"weights/{settings.stored_name}"
    return store.begin(key, _stage_settings(store, settings, policies), overwrite=overwrite)


def _policies(store: Store, weightings: Sequence[WeightSettings]) -> list[str]:
    """The policies that are read: baselines do without a behavior policy that was never scored."""
    first = weightings[0]
    baselines = all(settings.level in BASELINES for settings in weightings)
    if baselines and f"scores/{first.behavior}" not in store.manifest.stages:
        return [first.target]
    return [first.target, first.behavior]


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
        table = read_columns(store.file(entry.summary or entry.file), ["source"])
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
    return WeightJob(
        root=store.path.absolute(),
        name=shard.name,
        target_policy=settings.target,
        behavior_policy=settings.behavior,
        corpus=shard.entries[CORPUS],
        target=shard.entries[f"scores/{settings.target}"],
        behavior=shard.entries.get(f"scores/{settings.behavior}"),
        weightings=(),
    )


def _corpus_wide(
    store: Store, jobs: Sequence[WeightJob], settings: WeightSettings, progress: Progress
) -> Weighting:
    """A weighting with what it needs to know of all shards: the mean log-ratio, the mean weight, the tokens' text."""
    by_text = settings.level == "block" and settings.block_by != "tokens"
    weighting = Weighting(settings, cutter=open_block_cutter(store, settings) if by_text else None)
    decisions = store.stage(weighting.key).decisions
    if settings.center == "corpus":
        center = _mean(sum_log_ratios, jobs, settings, "log-ratio", progress)
        decisions["center"] = center
        weighting = replace(weighting, center=center)
    if settings.normalize == "corpus":
        weighed = [replace(job, weightings=(weighting,)) for job in jobs]
        mean = _mean(sum_weights, weighed, settings, "weight", progress)
        if mean <= 0:
            raise UsageError("normalize corpus: no positive sample has a weight to take the mean of")
        decisions["scale"] = 1 / mean
        weighting = replace(weighting, scale=1 / mean)
    return weighting


def _mean(
    summed: Callable[[WeightJob], tuple[float, int]],
    jobs: Sequence[WeightJob],
    settings: WeightSettings,
    what: str,
    progress: Progress,
) -> float:
    progress.begin(f"mean {what}", len(jobs), "shards")
    found = []
    with contextlib.closing(_run(summed, jobs, settings)) as parts:
        for part in parts:
            found.append(part)
            progress.advance(1)
    progress.end()
    # Sorted, so that the sum does not depend on which worker was first.
    total = sum(part for part, _ in sorted(found))
    tokens = sum(count for _, count in found)
    mean = total / tokens if tokens else 0.0
    progress.say(f"mean {what} of {tokens:,} scored tokens: {mean:.6g}")
    return mean


def _weigh(store: Store, jobs: Sequence[WeightJob], settings: WeightSettings, progress: Progress) -> None:
    """Weight shards, and enter each in the manifest as it comes."""
    if not jobs:
        return
    names = sorted({weighting.key for job in jobs for weighting in job.weightings})
    tokens = {job.name: job.target.num_scored for job in jobs}
    progress.begin(", ".join(names), sum(tokens.values()), "tokens")
    try:
        with contextlib.closing(_run(Timed(weigh_shard), jobs, settings)) as weighed:
            for took in weighed:
                for key, entry in took.result.items():
                    store.commit(key, entry)
                progress.advance(tokens[entry.name])
                note = f"{entry.rows} samples"
                progress.shard(entry.name, note, seconds=took.seconds, worker=took.process)
    finally:
        progress.end()


def _run(
    work: Callable[[WeightJob], Found], jobs: Sequence[WeightJob], settings: WeightSettings
) -> Generator[Found, None, None]:
    tokens = sum(job.target.num_scored * max(1, len(job.weightings)) for job in jobs)
    workers = settings.workers or (
        default_workers(len(jobs), tokens) if settings.runner == "local" else len(jobs)
    )
    return run_shards(
        work,
        jobs,
        tokens=tokens,
        workers=workers,
        runner=settings.runner,
        ray_address=settings.ray_address,
        root=jobs[0].root,
    )


def _outcome(store: Store, key: str) -> Outcome:
    stage = store.stage(key)
    statuses: Counter[str] = Counter()
    for shard in stage.shards:
        statuses.update(shard.counts)
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items()))
    summary = f"{key}: {stage.num_scored:,} weighted tokens in {stage.rows:,} samples ({counts})"
    return Outcome(summary, rejected=statuses.get(STATUS_UNSCORED, 0))
