"""What an export came to: counted while it is written, kept in its manifest, told at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pear_data import __version__
from pear_data.config import ExportSettings
from pear_data.redaction import redacted
from pear_data.stages.export.formats import Format
from pear_data.stages.export.manifest import ExportedFile, ExportManifest, LiveSettings, Split
from pear_data.store import Store


@dataclass(slots=True)
class Totals:
    """Counts over what is written; `cut` are samples that lost tokens, `left_out` those not written, by reason."""

    num_tokens: int = 0
    num_scored: int = 0
    weight_sum: float = 0.0
    cut: int = 0
    cut_tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    samples: Counter[Split] = field(default_factory=Counter)


def manifest_of(
    store: Store,
    settings: ExportSettings,
    form: Format,
    totals: Totals,
    files: list[ExportedFile],
    *,
    weights: list[str],
    live: tuple[LiveSettings | None, list[str]],
) -> ExportManifest:
    """The manifest; `weights` and the second of `live` are the checksums of the shards that were read."""
    tokenizer = store.manifest.tokenizer
    assert tokenizer is not None
    return ExportManifest(
        format=settings.format,
        created_by=f"pear-data {__version__}",
        alignment=form.alignment,
        normaliser=form.normaliser,
        flags=form.flags,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        template_fingerprint=tokenizer.template_fingerprint,
        weighting=settings.weights,
        weighting_settings=store.stage(f"weights/{settings.weights}").settings,
        weights_sha256=weights,
        max_length=settings.max_length,
        eval_fraction=settings.eval_fraction,
        where=redacted(settings.where) if settings.where else None,
        shard_tokens=settings.shard_tokens,
        live=live[0],
        live_sha256=live[1],
        files=files,
        samples=totals.samples.total(),
        splits={split: count for split, count in totals.samples.items() if count},
        num_tokens=totals.num_tokens,
        num_scored=totals.num_scored,
        mean_weight=totals.weight_sum / max(totals.num_scored, 1),
        cut=totals.cut,
        cut_tokens=totals.cut_tokens,
        left_out={reason: count for reason, count in sorted(totals.left_out.items()) if count},
    )


def nothing_left(weights: str, settings: ExportSettings, totals: Totals) -> str:
    """Why there is nothing to train on."""
    reasons = _counts(totals.left_out)
    if evaluated := totals.samples["validation"]:
        return f"{weights}: all {evaluated:,} samples fall to evaluation: lower --eval-fraction"
    if settings.where is None and settings.max_length is None:
        return f"{weights} has no sample to export ({reasons}): see `pear-data stats`"
    return f"{weights}: no sample is left to export ({reasons}): widen --where or --max-length"


def summary(out: Path, manifest: ExportManifest) -> str:
    """What was written, cut and left out, in a line."""
    parts = [
        f"{out}: {manifest.samples:,} samples, {manifest.num_scored:,} weighted tokens, "
        f"mean weight {manifest.mean_weight:.4f}; files: {len(manifest.files):,}, read again and sound"
    ]
    if manifest.eval_fraction:
        parts.append(f"for evaluation: {manifest.splits.get('validation', 0):,} of the samples")
    if manifest.format == "hf-packed":
        packs = sum(file.rows for file in manifest.files)
        full = manifest.num_tokens / (packs * (manifest.max_length or 1))
        parts.append(f"packs: {packs:,}, {full:.1%} full")
    if manifest.cut:
        parts.append(
            f"cut to {manifest.max_length:,} tokens: {manifest.cut:,} samples ({manifest.cut_tokens:,} tokens lost)"
        )
    if manifest.left_out:
        parts.append(f"left out: {_counts(manifest.left_out)}")
    return "; ".join(parts)


def _counts(left_out: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()) if count)
