"""What scoring a policy would take: the corpus counted, the model sized, and a small part of the corpus timed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pear_data.config import ScoreSettings
from pear_data.engines.checkpoint import load_config
from pear_data.errors import UsageError
from pear_data.progress import Progress
from pear_data.resources import resolve
from pear_data.stages.calibration import Calibration, calibrate
from pear_data.stages.engine_costs import EngineCosts, Memory
from pear_data.stages.model_size import Flops, ModelSize, model_size
from pear_data.stages.opened_source import open_source
from pear_data.store import Store
from pear_data.store.manifest import CORPUS, Shard, differing_fields

ROW_BYTES = 40  # of a scored sample, its log-probs apart


@dataclass(slots=True)
class Work:
    """Samples of some shards; those too long for the model are counted, but make no work."""

    samples: int = 0
    tokens: int = 0
    scored: int = 0
    longest: int = 0
    too_long: int = 0
    run_tokens: int = 0
    longest_run: int = 0
    forward_passes: int = 0
    flops: Flops = field(default_factory=Flops)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `--dry-run` tells."""

    identity: Mapping[str, Any]  # of the engine
    max_length: int  # tokens of the longest sample that is scored
    whole: Work
    left: Work  # of the shards without this policy's log-probs
    shards: int
    shards_left: int
    size: ModelSize
    forward_tokens: int
    memory: Memory
    calibration: Calibration | None
    flops_per_second: float | None
    workers: int
    speedup: int  # by workers side by side
    differences: Sequence[str]  # settings of stored log-probs of this name that are not these

    @property
    def seconds(self) -> float | None:
        """Time of what is left. FLOPs are scaled up, not tokens: long samples cost more a token."""
        return self.left.flops.total / self.flops_per_second / self.speedup if self.flops_per_second else None

    @property
    def disk_bytes(self) -> int:
        """Of the log-probs of what is left, at most."""
        return 4 * self.left.scored + ROW_BYTES * self.left.samples


def plan_scoring(store: Store, settings: ScoreSettings, progress: Progress) -> Plan:
    """Plan what `score_policy` would do with these settings. The store is only read; the model is loaded, to time it.

    Raises:
        UsageError: no model is given, or the corpus is not ingested completely.
        MismatchError, PearError: as `open_source`.
    """
    if settings.model is None:
        raise UsageError("--dry-run plans the work of a model: give --model M")
    corpus = store.complete_stage(CORPUS)
    config = load_config(resolve(settings.model), settings.revision, settings.trust_remote_code)
    size = model_size(config, settings.trust_remote_code)
    # One engine is enough to be timed.
    with open_source(store, settings.model_copy(update={"workers": 1}), progress) as source:
        identity, longest = source.settings, int(source.settings["max_length"])
        calibration = calibrate(store, source, longest)
    costs = EngineCosts(identity, size)
    key = f"scores/{settings.policy}"
    differences = _differences(store, key, {**identity, "inputs": {CORPUS: corpus.fingerprint}})
    pending = corpus.shards if differences else _pending(store, key)
    left = _work(store, pending, costs, longest)
    # On one CPU, workers share the cores that the calibration had to itself.
    parallel = identity["device"] == "cuda" or settings.runner == "ray"
    return Plan(
        identity=identity,
        max_length=longest,
        whole=left if len(pending) == len(corpus.shards) else _work(store, corpus.shards, costs, longest),
        left=left,
        shards=len(corpus.shards),
        shards_left=len(pending),
        size=size,
        forward_tokens=costs.forward_tokens,
        memory=costs.memory(left.longest_run, settings.tensor_parallel),
        calibration=calibration,
        flops_per_second=None if calibration is None else _rate(calibration, costs),
        workers=settings.workers,
        speedup=settings.workers if parallel else 1,
        differences=differences,
    )


def _differences(store: Store, key: str, settings: dict[str, Any]) -> list[str]:
    stage = store.manifest.stages.get(key)
    return differing_fields(stage.settings, settings) if stage is not None and stage.shards else []


def _pending(store: Store, key: str) -> list[Shard]:
    """The corpus's shards that lack this policy's log-probs."""
    stage = store.manifest.stages.get(key)
    return [
        shard
        for shard in store.stage(CORPUS).shards
        if stage is None or not store.is_current(key, stage.shard(shard.name), {CORPUS: shard.file.sha256})
    ]


def _work(store: Store, shards: Sequence[Shard], costs: EngineCosts, max_length: int) -> Work:
    work, budget = Work(), costs.forward_tokens
    packed = 0  # tokens of samples that share forward passes
    for shard in shards:
        for table in store.row_groups(shard, ["num_tokens", "num_scored"]):
            num_tokens = table["num_tokens"].to_numpy().astype(np.int64)
            num_scored = table["num_scored"].to_numpy().astype(np.int64)
            work.samples += len(num_tokens)
            work.tokens += int(num_tokens.sum())
            work.scored += int(num_scored.sum())
            work.longest = max(work.longest, int(num_tokens.max(initial=0)))
            fits = num_tokens <= max_length
            work.too_long += int((~fits).sum())
            num_tokens, num_scored = num_tokens[fits], num_scored[fits]
            work.run_tokens += int(num_tokens.sum())
            work.longest_run = max(work.longest_run, int(num_tokens.max(initial=0)))
            alone = num_tokens > budget
            work.forward_passes += int(alone.sum())
            packed += int(num_tokens[~alone].sum())
            work.flops += costs.flops(num_tokens, num_scored)
    work.forward_passes += math.ceil(packed / budget)
    return work


def _rate(calibration: Calibration, costs: EngineCosts) -> float:
    flops = costs.flops(calibration.num_tokens, calibration.num_scored)
    return flops.total / calibration.seconds
