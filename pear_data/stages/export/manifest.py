"""`OUT/pear_export.json`: what a trainer, and whoever finds the folder, must know of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pear_data.errors import UsageError

EXPORT_MANIFEST = "pear_export.json"

Split = Literal["train", "validation"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExportedFile(_Entry):
    """One file of an export."""

    name: str
    split: Split
    rows: int = Field(description="Samples; in hf-packed, packs.")
    sha256: str


class LiveSettings(_Entry):
    """What live weights need to equal the weighting while the model is the initial policy."""

    behavior: str = Field(description="Policy whose log-probs stand in behavior_logprobs.")
    level: Literal["token", "block", "sequence"] = Field(
        description="Like what follows, the weighting's; the defaults of `weight` where the weighting is uniform."
    )
    block_size: int
    gamma: float
    clip_log_ratio: tuple[float, float]
    clip_log_weight: tuple[float, float]
    negative_scale: float


class ExportManifest(_Entry):
    """`OUT/pear_export.json`: what a trainer must know to use the weights rightly."""

    format: str
    created_by: str
    alignment: str = Field(description="Which token a weight multiplies.")
    normaliser: str = Field(description="The loss that its trainer makes of the weights.")
    flags: str | None = Field(None, description="What its trainer must be given, or the weights are lost.")
    tokenizer: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    weighting: str = Field(description="Name of the weighting in the store.")
    weighting_settings: dict[str, Any]
    weights_sha256: list[str] = Field(description="Checksums of the weight shards this was made from.")
    max_length: int | None = Field(
        None, description="Tokens a sample was cut to; in shifted, also filled up to."
    )
    eval_fraction: float = Field(0.0, description="Share of the samples in the split validation.")
    where: str | None = Field(None, description="SQL predicate that every sample here fulfils.")
    shard_tokens: int | None = Field(None, description="Tokens after which a file was closed.")
    live: LiveSettings | None = None
    live_sha256: list[str] = Field(
        default_factory=list, description="Checksums of the behavior policy's score shards, with live."
    )
    files: list[ExportedFile] = Field(default_factory=list)
    samples: int
    splits: dict[str, int] = Field(default_factory=dict, description="Samples in each split.")
    num_tokens: int
    num_scored: int
    mean_weight: float = Field(description="Mean over scored tokens.")
    cut: int = Field(0, description="Samples that lost tokens to max_length.")
    cut_tokens: int = Field(0, description="Tokens lost to max_length.")
    left_out: dict[str, int] = Field(description="Samples not exported, by status or reason.")


DETERMINED_BY = {
    "format",
    "weighting",
    "weighting_settings",
    "weights_sha256",
    "max_length",
    "eval_fraction",
    "where",
    "shard_tokens",
    "live",
    "live_sha256",
}


def read_export_manifest(folder: Path) -> ExportManifest:
    """The manifest of the export in `folder`.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    path = folder / EXPORT_MANIFEST
    if not folder.exists():
        raise UsageError(f"there is no export at {folder}")
    if not path.is_file():
        raise UsageError(f"{folder} exists and is no export of ours: choose another OUT")
    try:
        return ExportManifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise UsageError(f"{path} is not readable as an export's manifest: choose another OUT") from None
