"""Arrow schemas and Parquet encodings of every artefact in a store.

Lists hold non-null elements (they read faster); log-probs and token weights are byte-stream-split, because their
exponents repeat and their mantissas do not. No dictionary is built for columns whose values hardly repeat.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

FORMAT_VERSION = 2

STATUS_OK = "ok"
STATUS_TOO_LONG = "too_long"
STATUS_NONFINITE = "nonfinite"
STATUS_BAD_FIELD = "bad_field"
STATUS_FAILED = "failed"  # the engine dies of it
STATUS_UNALIGNED = "unaligned"  # a policy of another tokenizer or template reads another text
STATUS_UNSCORED = "unscored"
STATUS_DROPPED = "dropped"
WEIGHT_STATUSES = (STATUS_OK, STATUS_UNSCORED, STATUS_DROPPED)


def _list_of(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


INT32S = _list_of(pa.int32())
INPUT_IDS = INT32S
LOSS_MASK = _list_of(pa.bool_())
FLOATS = _list_of(pa.float32())
INT64S = _list_of(pa.int64())
DOUBLES = _list_of(pa.float64())

DECILES = 10

CORPUS = pa.schema(
    [
        _required("sample_id", pa.string()),
        _required("source", pa.string()),
        _required("label", pa.int8()),
        _required("input_ids", INPUT_IDS),
        _required("loss_mask", LOSS_MASK),
        _required("num_tokens", pa.int32()),
        _required("num_scored", pa.int32()),
        _required("record", pa.string()),
    ]
)

SCORES = pa.schema(
    [
        _required("sample_id", pa.string()),
        pa.field("logprobs", FLOATS),
        # Scored tokens of each span, in order, where the policy has another tokenizer (--align bytes); else null.
        pa.field("span_tokens", INT32S),
        _required("num_scored", pa.int32()),
        pa.field("logprob_sum", pa.float64()),
        _required("status", pa.string()),
    ]
)

# Beside each part of the corpus: what is asked of samples and sources without their tokens.
CORPUS_SUMMARY = pa.schema(
    [CORPUS.field(name) for name in ("sample_id", "source", "label", "num_tokens", "num_scored")]
)

WEIGHTS = pa.schema(
    [
        _required("sample_id", pa.string()),
        pa.field("weights", FLOATS),
        _required("num_scored", pa.int32()),
        _required("status", pa.string()),
    ]
)

# Beside each part of a weighting, one row per sample. Null where the sample has no weights, log-ratios also where only
# one policy is known.
WEIGHT_SUMMARY = pa.schema(
    [
        _required("sample_id", pa.string()),
        _required("num_scored", pa.int32()),
        pa.field("log_ratio_sum", pa.float64()),
        pa.field("weight_sum", pa.float64()),
        pa.field("weight_square_sum", pa.float64()),
        pa.field("weight_min", pa.float32()),
        pa.field("weight_max", pa.float32()),
        pa.field("clipped_low", pa.int32()),
        pa.field("clipped_high", pa.int32()),
        pa.field("saturated_low", pa.int32()),
        pa.field("saturated_high", pa.int32()),
        _required("status", pa.string()),
    ]
)

# Beside each part of a weighting, one row per source: sums over those with label 1 and status ok. Lists of `DECILES`
# hold tenths of samples, first to last; bins are those of `pear_data.binning`.
WEIGHT_TOTALS = pa.schema(
    [
        _required("source", pa.string()),
        *(_required(name, pa.int64()) for name in ("samples", "negatives", "ok", "unscored", "dropped")),
        _required("sample_mean_sum", pa.float64()),
        _required("sample_mean_square_sum", pa.float64()),
        _required("sample_ratio_square_sum", pa.float64()),
        _required("log_ratio_min", pa.float64()),
        _required("log_ratio_max", pa.float64()),
        _required("weight_min", pa.float32()),
        _required("weight_max", pa.float32()),
        *(
            _required(name, INT64S)
            for name in ("tokens", "clipped_low", "clipped_high", "saturated_low", "saturated_high")
        ),
        *(
            _required(name, DOUBLES)
            for name in (
                "weight_sum",
                "weight_square_sum",
                "target_logprob_sum",
                "behavior_logprob_sum",
                "log_ratio_square_sum",
            )
        ),
        *(
            field
            for name in ("log_ratio", "weight", "sample_weight")
            for field in (_required(f"{name}_bins", INT32S), _required(f"{name}_counts", INT64S))
        ),
    ]
)

QUARANTINE = pa.schema(
    [
        _required("input", pa.string()),
        _required("row", pa.int64()),
        _required("reason", pa.string()),
        _required("raw", pa.binary()),
    ]
)

# Which quarantined rows of a corpus are, mended, in a later shard of it.
MENDED = pa.schema([_required("input", pa.string()), _required("row", pa.int64())])

VOCABULARY = pa.schema([_required("token_id", pa.int32()), _required("token", pa.string())])

EXPORT_HF = pa.schema(
    [
        _required("input_ids", INPUT_IDS),
        _required("attention_mask", _list_of(pa.int8())),
        _required("labels", _list_of(pa.int32())),
        _required("loss_weights", FLOATS),
        _required("sample_id", pa.string()),
        _required("source", pa.string()),
    ]
)

EXPORT_PACKED = pa.schema(
    [
        _required("input_ids", INPUT_IDS),
        _required("labels", _list_of(pa.int32())),
        _required("loss_weights", FLOATS),
        _required("position_ids", _list_of(pa.int32())),
        _required("seq_lengths", _list_of(pa.int32())),
        _required("sample_ids", _list_of(pa.string())),
    ]
)

EXPORT_VERL = pa.schema(
    [
        _required("input_ids", INPUT_IDS),
        _required("loss_weights", FLOATS),
        _required("sample_id", pa.string()),
        _required("source", pa.string()),
    ]
)

# What `export --live` adds to a row: at the index of the label, 0 where nothing is scored.
BEHAVIOR_LOGPROBS = _required("behavior_logprobs", FLOATS)

ARTEFACTS: dict[str, pa.Schema] = {
    "corpus": CORPUS,
    "corpus_summary": CORPUS_SUMMARY,
    "scores": SCORES,
    "weights": WEIGHTS,
    "weight_summary": WEIGHT_SUMMARY,
    "weight_totals": WEIGHT_TOTALS,
    "quarantine": QUARANTINE,
    "mended": MENDED,
    "vocabulary": VOCABULARY,
    "export_hf": EXPORT_HF,
    "export_packed": EXPORT_PACKED,
    "export_verl": EXPORT_VERL,
}

_REPEATING = {"source", "status", "reason", "input"}
_SPLIT = {
    "logprobs.list.element",
    "weights.list.element",
    "loss_weights.list.element",
    "behavior_logprobs.list.element",
}


def _leaf_paths(schema: pa.Schema) -> list[str]:
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]


def _split(schema: pa.Schema) -> dict[str, str] | None:
    return {path: "BYTE_STREAM_SPLIT" for path in _leaf_paths(schema) if path in _SPLIT} or None


def parquet_options(schema: pa.Schema, *, in_runs: bool = False) -> dict[str, Any]:
    """Keyword arguments of `pyarrow.parquet.ParquetWriter` for one of the schemas above.

    `in_runs` says that floats repeat from token to token, as the weights of blocks and sequences do: then they compress
    best as they are.
    """
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": sorted(_REPEATING.intersection(schema.names)) or False,
        "column_encoding": None if in_runs else _split(schema),
        "use_compliant_nested_type": True,
        # The least and greatest of a million tokens of many samples rule nothing out.
        "write_statistics": [field.name for field in schema if not pa.types.is_list(field.type)] or False,
    }
