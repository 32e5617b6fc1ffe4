"""Settings of every stage: one pydantic model each, shared by the command line, recipes and the manifest."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from pear_data.trainers import FORMATS, format_fault
from pear_data.weighting import CLIP_LOG_RATIO, CLIP_LOG_WEIGHT

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_LOG_FLOAT32_MAX = 88.72
INITIAL = "initial"
BEHAVIOR = "behavior"


def _check_name(name: str) -> str:
    if not _NAME.match(name):
        raise ValueError(
            f"{name!r} is no name: letters, digits, '_', '-' and '.', at most 64, a letter or digit first"
        )
    return name


# Names become folders of the store and columns of the views; nothing read from a corpus ever does.
Name = Annotated[str, AfterValidator(_check_name)]


def _check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] <= bounds[1]:
        raise ValueError(f"{bounds[0]} > {bounds[1]}: the lower bound comes first")
    return bounds


Bounds = Annotated[tuple[float, float], AfterValidator(_check_bounds)]
WeightLevel = Literal["token", "block", "sequence", "uniform", "dft"]
# Levels that are no importance weights: what plain SFT and dynamic fine-tuning (arXiv 2508.05629) would weigh.
BASELINES = ("uniform", "dft")


class Settings(BaseModel):
    """Unknown keys are errors: a misspelt option must not pass for its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def first_fault(error: ValidationError) -> tuple[list[str], str]:
    """Where the first fault of a refused model is (its fields, outermost first) and what it is."""
    fault = error.errors()[0]
    if fault["type"] == "tuple_type":  # no word of YAML's
        fault["msg"] = "Input should be a list"
    return [str(part) for part in fault["loc"]], fault["msg"].removeprefix("Value error, ")


class IngestSettings(Settings):
    """Reading and tokenizing a corpus."""

    corpus: list[str] = Field(min_length=1, description="Files, dataset directories, or '-' for stdin.")
    tokenizer: str = Field(description="Hub name or directory of the initial policy's tokenizer.")
    revision: str | None = Field(None, description="Revision of the tokenizer on the hub.")
    chat_template: str | None = Field(
        None, description="File with a chat template that replaces the tokenizer's; 'none' for raw text."
    )
    turns: Literal["last", "all"] | None = Field(
        None, description="What to score where the chat template rewrites earlier turns."
    )
    prompt_field: str | None = Field(None, description="Field that holds the prompt.")
    response_field: str | None = Field(None, description="Field that holds the response.")
    id_field: str | None = Field(None, description="Field that holds the sample id; ':row' numbers the rows.")
    source_field: str | None = Field(None, description="Field that names where a sample comes from.")
    label_field: str | None = Field(None, description="Field with 1 (positive) or -1 (negative).")
    limit: int | None = Field(None, ge=1, description="Read at most this many rows.")
    max_bad: int | None = Field(None, ge=0, description="Stop when more rows than this are quarantined.")
    shard_tokens: int = Field(4_000_000, ge=1, description="Tokens per shard, the unit of resuming.")
    trust_remote_code: bool = Field(False, description="Run code shipped with the tokenizer.")


class ScoreSettings(Settings):
    """Log-probs of the scored tokens under one policy."""

    policy: Name = Field(INITIAL, description="Name the log-probs are stored under.")
    model: str | None = Field(None, description="Hub name or directory of the policy's model.")
    revision: str | None = Field(None, description="Revision of the model on the hub.")
    from_field: str | None = Field(
        None, description="Take log-probs recorded at generation time from this field of the corpus."
    )
    engine: Literal["auto", "vllm", "transformers"] = Field("auto", description="What runs the model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Model precision.")
    head_dtype: Literal["model", "float32"] = Field(
        "model", description="Precision of vLLM's output head; transformers' is float32 in any case."
    )
    max_length: int | None = Field(None, ge=2, description="Samples longer than this get status too_long.")
    align: Literal["ids", "bytes"] = Field(
        "ids", description="bytes: a model of another tokenizer scores the same text, see README."
    )
    model_template: str | None = Field(
        None,
        description="File with a chat template that replaces the model's where align is bytes; 'none' for raw text.",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share one copy of the model (vLLM).")
    engine_arg: tuple[str, ...] = Field(
        (), description="KEY=VALUE passed on to vllm.LLM, VALUE as YAML; may be given again."
    )
    workers: int = Field(1, ge=1, description="Engines at work side by side, each on GPUs of its own.")
    runner: Literal["local", "ray"] = Field("local", description="Where the engines run.")
    ray_address: str | None = Field(None, description="Ray cluster to join; by default the one Ray finds.")
    audit: int | None = Field(
        None, ge=1, description="Score this many samples again in plain float32 and tell the noise."
    )
    trust_remote_code: bool = Field(False, description="Run code shipped with the model.")

    @model_validator(mode="after")
    def _auditable(self) -> ScoreSettings:
        if self.audit and self.from_field:
            raise ValueError(
                "audit scores again with the policy's model, which recorded log-probs do not name"
            )
        if self.audit and self.align == "bytes":
            raise ValueError(
                "audit compares token by token; with align bytes a token's log-prob is its share of a span"
            )
        return self

    @model_validator(mode="after")
    def _templated(self) -> ScoreSettings:
        if self.model_template and self.align != "bytes":
            raise ValueError(
                "model_template goes with align bytes: token ids are scored as they are in the corpus"
            )
        return self

    @model_validator(mode="after")
    def _addressed(self) -> ScoreSettings:
        if self.ray_address and self.runner != "ray":
            raise ValueError("ray_address goes with runner ray: without it the engines run on this machine")
        return self


class SourceWeighting(Settings):
    """What one source is weighted with in place of the whole corpus's setting; null keeps that."""

    gamma: float | None = Field(None, gt=0, le=1, description="Discount per token.")
    clip_log_ratio: Bounds | None = Field(None, description="Bounds of a token's log-ratio.")
    clip_log_weight: Bounds | None = Field(None, description="Bounds of a log-weight.")


class WeightSettings(Settings):
    """Importance weights from two policies' log-probs (method: PEAR 3.2 to 3.7), or a baseline to hold them against."""

    level: WeightLevel = Field(
        "block",
        description="Where log-ratios are summed; or a baseline: uniform (1), dft (the target's own probability).",
    )
    block_by: Literal["tokens", "lines", "sentences", "regex"] = Field(
        "tokens",
        description="What a block is (block level): so many tokens, or a piece of the response's text.",
    )
    block_size: int = Field(
        4, ge=1, le=2**31 - 1, description="Tokens per block, where blocks are by tokens."
    )
    block_regex: str | None = Field(
        None, description="Python regular expression; a block ends where a match ends (--block-by regex)."
    )
    gamma: float = Field(0.999, gt=0, le=1, description="Discount per token (token and block level).")
    clip_log_ratio: Bounds = Field(CLIP_LOG_RATIO, description="Bounds of a token's log-ratio.")
    clip_log_weight: Bounds = Field(CLIP_LOG_WEIGHT, description="Bounds of a log-weight.")
    center: Literal["none", "sample", "corpus"] = Field(
        "none", description="Whose mean log-ratio is subtracted from every log-ratio before the clip."
    )
    normalize: Literal["none", "sample", "corpus"] = Field(
        "none", description="Whose weights are scaled to a mean of 1 over the scored tokens."
    )
    per_source: dict[str, SourceWeighting] = Field(
        default_factory=dict, description="Clips and gamma of single sources, by source."
    )
    negative_scale: float = Field(0.0, ge=0, description="Lambda of negatives; 0 drops them from training.")
    name: Name | None = Field(None, description="Name of the weighting; the level by default.")
    target: Name = Field(INITIAL, description="Policy in the numerator.")
    behavior: Name = Field(BEHAVIOR, description="Policy in the denominator.")
    workers: int | None = Field(
        None,
        ge=1,
        description="Shards worked on at once; by default as many as there are cores, where that pays.",
    )
    runner: Literal["local", "ray"] = Field("local", description="Where the shards are worked on.")
    ray_address: str | None = Field(None, description="Ray cluster to join; by default the one Ray finds.")

    @model_validator(mode="after")
    def _compares_two_policies(self) -> WeightSettings:
        if self.target == self.behavior:
            raise ValueError(f"target and behavior are both {self.target!r}: weights compare two policies")
        return self

    @model_validator(mode="after")
    def _fits_float32(self) -> WeightSettings:
        highest = max(
            [
                self.clip_log_weight[1],
                *(s.clip_log_weight[1] for s in self.per_source.values() if s.clip_log_weight),
            ]
        )
        if highest + math.log(max(1.0, self.negative_scale)) > _LOG_FLOAT32_MAX:
            raise ValueError(
                "weights could exceed the largest float32: lower the upper clip_log_weight or negative_scale"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit(self) -> WeightSettings:
        if self.block_by != "tokens" and self.level != "block":
            raise ValueError(f"block_by goes with level block, not {self.level}")
        if (self.block_by == "regex") != (self.block_regex is not None):
            raise ValueError("block_by regex and block_regex go together")
        if self.block_by != "tokens" and self.block_size != type(self).model_fields["block_size"].default:
            raise ValueError(f"block_size goes with block_by tokens, not {self.block_by}")
        if self.block_regex is not None:
            try:
                re.compile(self.block_regex)
                self.block_regex.encode()
            except (re.error, UnicodeEncodeError) as error:
                raise ValueError(f"block_regex is no regular expression: {error}") from None
            if not self.block_regex:
                raise ValueError("block_regex is empty, so that no block would end before its turn does")
        return self

    @model_validator(mode="after")
    def _has_effect(self) -> WeightSettings:
        if self.level in BASELINES:
            for name in ("center", "normalize", "per_source"):
                if getattr(self, name) not in ("none", {}):
                    raise ValueError(
                        f"{name} goes with importance weights, not with the baseline {self.level}"
                    )
        if self.level == "sequence" and self.normalize == "sample":
            raise ValueError("normalize sample makes every sequence-level weight 1: use normalize corpus")
        if self.ray_address and self.runner != "ray":
            raise ValueError("ray_address goes with runner ray")
        return self

    @property
    def stored_name(self) -> str:
        return self.name or self.level


def _check_format(name: str) -> str:
    if fault := format_fault(name):
        raise ValueError(fault)
    return name


class ExportSettings(Settings):
    """A weighted dataset for a trainer."""

    out: str = Field(description="Directory to write; must be new or empty.")
    weights: Name = Field("block", description="Weighting to export.")
    format: Annotated[str, AfterValidator(_check_format)] = Field(
        "hf",
        description=f"Layout of the dataset: {', '.join(FORMATS)}.",
        json_schema_extra={"enum": [*FORMATS]},
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Tokens a sample is cut to, and packs and rows of shifted are filled to (not swift, messages).",
    )
    eval_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the samples for evaluation (validation-*), chosen by their ids alone.",
    )
    where: str | None = Field(
        None,
        min_length=1,
        description="SQL predicate over the columns of the view `samples`; others stay out.",
    )
    live: bool = Field(
        False,
        description="Add the behavior policy's log-probs, for weights formed while training (hf, hf-packed).",
    )
    behavior: Name | None = Field(
        None, description="Policy whose log-probs --live adds; by default the weighting's."
    )
    shard_tokens: int = Field(
        16_000_000,
        ge=1,
        description="Tokens per file; streaming loaders want a multiple of ranks times workers of files.",
    )
    check: bool = Field(
        False, description="Write nothing; read the export at OUT again and fail where a row is not sound."
    )

    @model_validator(mode="after")
    def _fits_the_format(self) -> ExportSettings:
        if self.format == "hf-packed" and self.max_length is None and not self.check:
            raise ValueError("format hf-packed needs max_length, the tokens of a pack")
        if self.max_length is not None and self.format not in ("hf", "hf-packed", "verl", "shifted"):
            raise ValueError(f"max_length does not go with format {self.format}, whose rows stay whole")
        if self.live and self.format not in ("hf", "hf-packed"):
            raise ValueError(f"live goes with format hf or hf-packed, not {self.format}")
        if self.behavior is not None and not self.live:
            raise ValueError("behavior goes with live: without it no policy's log-probs are exported")
        return self


class ReportSettings(Settings):
    """One self-contained HTML page."""

    out: str = Field(description="HTML file to write.")
    weights: Name | None = Field(None, description="Weighting to show; all of them by default.")
