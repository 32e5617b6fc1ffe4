"""The numerics audit: a few samples of a scored policy again, in plain float32, and how far the stored numbers are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.config import ScoreSettings
from pear_data.corpus.batches import token_batch
from pear_data.engines.model_identity import model_identity
from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.progress import Outcome, Progress
from pear_data.resources import resolve
from pear_data.schema import STATUS_OK
from pear_data.stages.alignment import aligned_row_groups, aligned_shards
from pear_data.stages.audit_reference import PlainFloat32
from pear_data.stages.histogram import Histogram
from pear_data.stages.logged import logged
from pear_data.stages.noise import DECISION, HALF, Audit, noise_limit, smaller_clip
from pear_data.stages.spread import GroupLengths, by_group, spread_rows
from pear_data.stages.text import one_line
from pear_data.store import Store
from pear_data.store.columns import flat_values
from pear_data.store.manifest import CORPUS, Stage
from pear_data.weighting import CLIP_LOG_RATIO


def audit_policy(store: Store, settings: ScoreSettings, progress: Progress) -> Outcome:
    """Score `settings.audit` samples of a scored policy again and store the differences in the policy's stage.

    Memory is bounded by a row group, the model and a block of logits.

    Raises:
        UsageError: no model is given, the policy is not scored completely, or by spans of another tokenizer.
        MismatchError: the model is not the one that scored the policy, or an artefact changed on disk.
        PearError: the model cannot be loaded in float32, or its log-probs are not finite.
    """
    key = f"scores/{settings.policy}"
    return logged(store, [key], progress, lambda progress: _audit(store, key, settings, progress))


def _audit(store: Store, key: str, settings: ScoreSettings, progress: Progress) -> Outcome:
    assert settings.audit is not None
    stage = store.complete_stage(key)
    model = _checked_model(settings, stage)
    places = spread_rows(lambda: _lengths(store, key), settings.audit)
    if not places:
        return Outcome(f"audit of {key}: nothing to audit, no sample has status ok")
    rows = by_group(places)
    progress.begin(f"audit of {key}", len(places), "samples")
    try:
        reference = PlainFloat32(model, settings.revision, settings.trust_remote_code)
        found = _Differences()
        for corpus, scores in _chosen(store, key, rows):
            _compare(corpus, scores, reference, found, progress)
        audit = found.audit(reference.description)
        reference.close()
    finally:
        progress.end()
    stage.decisions[DECISION] = audit.model_dump(mode="json")
    store.save()
    if audit.is_noisy:
        progress.say(_warning(settings.policy, audit, stage))
    return Outcome(_summary(key, audit))


class _Differences:
    """Running numbers over stored - reference; memory is bounded by the histogram."""

    def __init__(self) -> None:
        self._sizes = Histogram()
        self._samples = 0
        self._sum = self._absolute_sum = 0.0
        self._largest = -1.0
        self._where = ("", 0)

    def add(self, sample_id: str, positions: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> None:
        """One sample: differences [T] of its scored tokens and their places in input_ids [T]."""
        sizes = np.abs(values)
        self._samples += 1
        self._sizes.add(sizes.astype(np.float32))
        self._sum += float(values.sum())
        self._absolute_sum += float(sizes.sum())
        worst = int(sizes.argmax())
        if sizes[worst] > self._largest:
            self._largest, self._where = float(sizes[worst]), (sample_id, int(positions[worst]))

    def audit(self, reference: str) -> Audit:
        median, p99 = self._sizes.quantiles([0.5, 0.99]).tolist()
        tokens = self._sizes.total
        return Audit(
            samples=self._samples,
            tokens=tokens,
            median=median,
            p99=p99,
            max=self._largest,
            mean=self._absolute_sum / tokens,
            bias=self._sum / tokens,
            max_sample_id=self._where[0],
            max_position=self._where[1],
            clip_log_ratio=CLIP_LOG_RATIO,
            reference=reference,
        )


def _checked_model(settings: ScoreSettings, stage: Stage) -> str:
    """The model to score with again, which must be the one that scored."""
    if settings.model is None:
        raise UsageError("--audit scores again with the policy's model: give it with --model M")
    model = resolve(settings.model)
    scored_with = stage.settings.get("weights_sha256")
    if scored_with != model_identity(model, settings.revision)["weights_sha256"]:
        raise MismatchError(
            f"--audit: scores/{settings.policy} was not scored with {settings.model} (weights_sha256 differs): "
            "give the model that scored it"
        )
    return model


def _lengths(store: Store, key: str) -> Iterator[GroupLengths]:
    """Every row group of the policy; rows with log-probs are eligible."""
    columns = {CORPUS: ["num_tokens"], key: ["status"]}
    for shard in aligned_shards(store, [key]):
        for group, tables in enumerate(aligned_row_groups(store, shard, columns)):
            ok = tables[key]["status"].to_numpy(zero_copy_only=False) == STATUS_OK
            corpus = tables[CORPUS]
            yield GroupLengths(shard.name, group, corpus["sample_id"], corpus["num_tokens"].to_numpy(), ok)


def _chosen(
    store: Store, key: str, rows: dict[tuple[str, int], npt.NDArray[np.int64]]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The chosen rows of the corpus and of the policy, a row group at a time."""
    columns = {CORPUS: ["input_ids", "loss_mask"], key: ["logprobs"]}
    for shard in aligned_shards(store, [key]):
        if not any(name == shard.name for name, _ in rows):
            continue
        for group, tables in enumerate(aligned_row_groups(store, shard, columns)):
            if (shard.name, group) in rows:
                taken = pa.array(rows[shard.name, group])
                yield tables[CORPUS].take(taken), tables[key].take(taken)


def _compare(
    corpus: pa.Table, scores: pa.Table, reference: PlainFloat32, found: _Differences, progress: Progress
) -> None:
    batch, stored = token_batch(corpus), flat_values(scores["logprobs"])
    for row, sample_id in enumerate(batch.sample_ids):
        sample = slice(*batch.offsets[row : row + 2])
        mask = batch.loss_mask[sample]
        expected = reference.logprobs(batch.input_ids[sample], mask)
        if not np.isfinite(expected).all():
            raise PearError(
                f"--audit: plain transformers gives sample {sample_id} a log-prob that is not finite: "
                "look at it with `pear-data show`"
            )
        values = stored[slice(*batch.scored_offsets[row : row + 2])] - expected
        found.add(sample_id, np.flatnonzero(mask), values)
        progress.advance(1)


def _summary(key: str, audit: Audit) -> str:
    low, high = audit.clip_log_ratio
    return (
        f"audit of {key}: {audit.samples:,} samples, {audit.tokens:,} tokens, |difference| median {audit.median:.2g}, "
        f"p99 {audit.p99:.2g}, max {audit.max:.2g} (sample {one_line(audit.max_sample_id)}, position "
        f"{audit.max_position}), mean {audit.mean:.2g}, bias {audit.bias:+.2g}; the log-ratio clips are {low:g} and "
        f"{high:g}; scored again by {audit.reference}"
    )


def _warning(policy: str, audit: Audit, stage: Stage) -> str:
    share = 100 * audit.p99 / smaller_clip(audit.clip_log_ratio)
    return (
        f"Warning: the noise of {policy}'s log-probs (p99 {audit.p99:.2g}) is {share:.0f} % of the smaller log-ratio "
        f"clip, so part of the clipping will be noise (more than {noise_limit(audit.clip_log_ratio):g} is too much). "
        f"Remedy: {_remedy(stage)}."
    )


def _remedy(stage: Stage) -> str:
    """What lowers the noise of a policy scored so, and what makes it matter less."""
    wider = "widen the clips (`pear-data weight --clip-log-ratio`)"
    if stage.settings.get("dtype") not in HALF:
        return f"compare with `--policy NAME --engine transformers`, or {wider}"
    half_head = stage.settings.get("engine") == "vllm" and stage.settings.get("head_dtype") != "float32"
    head = "--head-dtype float32 or " if half_head else ""
    return f"score it again with {head}--dtype float32 (and --overwrite), or {wider}"
