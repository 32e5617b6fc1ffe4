"""The published contracts in `schemas/`, generated: `python -m pear_data.contracts` writes them, a test finds drift.

NAME.schema.json   JSON Schema of a JSON or YAML document: what is written, or what a recipe may say
artefacts.json     the columns of every Parquet artefact
views.sql          the views of a store with the policies initial and behavior and one weighting, block
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import TypeAdapter

from pear_data import config, recipe
from pear_data.resources import folder
from pear_data.schema import ARTEFACTS, FORMAT_VERSION
from pear_data.stages.compare import Comparison
from pear_data.stages.export import ExportManifest
from pear_data.stages.statistics import WeightingStatistics
from pear_data.stages.status import StoreStatus
from pear_data.store.log import Event
from pear_data.store.manifest import FileEntry, Manifest, Shard, Stage, TokenizerEntry
from pear_data.store.view_sql import view_statements

Mode = Literal["validation", "serialization"]
DIALECT = "https://json-schema.org/draft/2020-12/schema"

# File name: (type, "serialization" for what pear-data writes, "validation" for what people write).
MODELS: dict[str, tuple[Any, Mode]] = {
    "manifest": (Manifest, "serialization"),
    "log_event": (Event, "serialization"),
    "status": (StoreStatus, "serialization"),
    "statistics": (list[WeightingStatistics], "serialization"),
    "comparison": (Comparison, "serialization"),
    "pear_export": (ExportManifest, "serialization"),
    "recipe": (recipe.Recipe, "validation"),
    "ingest_settings": (config.IngestSettings, "validation"),
    "score_settings": (config.ScoreSettings, "validation"),
    "weight_settings": (config.WeightSettings, "validation"),
    "export_settings": (config.ExportSettings, "validation"),
    "report_settings": (config.ReportSettings, "validation"),
}

# Artefact: where it lies.
PLACES = {
    "corpus": "STORE/corpus/part-NNNNN.parquet",
    "corpus_summary": "STORE/summary/corpus/part-NNNNN.parquet",
    "scores": "STORE/scores/POLICY/part-NNNNN.parquet",
    "weights": "STORE/weights/NAME/part-NNNNN.parquet",
    "weight_summary": "STORE/summary/weights/NAME/part-NNNNN.parquet",
    "weight_totals": "STORE/summary/weights/NAME/part-NNNNN.totals.parquet",
    "quarantine": "STORE/quarantine/corpus-part-NNNNN.parquet",
    "mended": "STORE/quarantine/mended-part-NNNNN.parquet",
    "vocabulary": "STORE/tokenizer/vocabulary.parquet",
    "export_hf": "OUT/train-NNNNN.parquet",
    "export_packed": "PACKED_OUT/train-NNNNN.parquet",
    "export_verl": "VERL_OUT/train-NNNNN.parquet",
}

# Column: what it holds; "ARTEFACT.column" where an artefact has a meaning of its own.
MEANINGS = {
    "sample_id": "Identity of a sample, unique in a store.",
    "source": "Where the sample comes from.",
    "label": "1, or -1 for a negative.",
    "input_ids": "Token ids, prompt included.",
    "loss_mask": "Whether each token is scored: the policy would have to emit it itself. Never the first.",
    "num_tokens": "Length of input_ids.",
    "num_scored": "Number of scored tokens.",
    "record": "The original row, as JSON.",
    "span_tokens": "Scored tokens of each span on which two tokenizers agree (--align bytes), in order; else null.",
    "logprobs": "Natural-log probability of each scored token, in order, or its even share of a span's; null where "
    "status is not ok.",
    "logprob_sum": "Sum of logprobs in float64; null where status is not ok.",
    "scores.status": "ok, too_long, nonfinite, bad_field, failed (by the engine) or unaligned (reads another text).",
    "weights": "Importance weight of each scored token, in order; null where status is unscored.",
    "log_ratio_sum": "Sum of the unclipped, uncentered log-ratios, target minus behavior.",
    "weight_sum": "Sum of the weights.",
    "weight_square_sum": "Sum of the squared weights: the effective sample size is weight_sum^2 / weight_square_sum.",
    "weight_min": "Least weight.",
    "weight_max": "Greatest weight.",
    "clipped_low": "Scored tokens whose log-ratio, centered if so asked, is below the lower clip.",
    "clipped_high": "Scored tokens whose log-ratio, centered if so asked, is above the upper clip.",
    "saturated_low": "Scored tokens whose suffix sum is at or below the lower log-weight clip.",
    "saturated_high": "Scored tokens whose suffix sum is at or above the upper log-weight clip.",
    "samples": "Samples with label 1 and status ok: those the sums are over.",
    "negatives": "Samples with label -1, of any status.",
    "ok": "Samples with status ok, negatives among them.",
    "unscored": "Samples with status unscored.",
    "dropped": "Samples with status dropped.",
    "sample_mean_sum": "Sum over samples of their mean weight.",
    "sample_mean_square_sum": "Sum over samples of their squared mean weight.",
    "sample_ratio_square_sum": "Sum over samples of exp(2 sum d), d the unclipped log-ratio; the exponent is bounded.",
    "log_ratio_min": "Least unclipped log-ratio; infinite where there is none.",
    "log_ratio_max": "Greatest unclipped log-ratio; minus infinity where there is none.",
    "tokens": "Scored tokens, by tenth of a sample.",
    "target_logprob_sum": "Sum of the target's log-probs, by tenth of a sample.",
    "behavior_logprob_sum": "Sum of the behavior policy's log-probs, by tenth of a sample; NaN where it is not known.",
    "log_ratio_square_sum": "Sum of d^2, by tenth of a sample.",
    "log_ratio_bins": "Bins of the unclipped log-ratios of tokens, ascending: leading 16 bits of the sortable float32.",
    "log_ratio_counts": "Tokens in each bin.",
    "weight_bins": "Bins of the weights of tokens.",
    "weight_counts": "Tokens in each bin.",
    "sample_weight_bins": "Bins of the samples' weight_sum.",
    "sample_weight_counts": "Samples in each bin.",
    "weight_summary.status": "As in weights.",
    "weights.status": "ok; unscored where a policy's status is not ok; dropped for a negative of weight 0.",
    "input": "The file or dataset the row comes from.",
    "row": "Number of the row in it, from 1; for text files the line.",
    "reason": "Why the row is no sample.",
    "raw": "The row as it was read.",
    "token_id": "Token id.",
    "token": "The text the token stands for, for people to read.",
    "attention_mask": "1 for every token.",
    "labels": "input_ids where scored, -100 elsewhere; unshifted.",
    "loss_weights": "Weight of each label, at the label's index; 0 where not scored.",
    "position_ids": "Position of each token in its sample, from 0.",
    "seq_lengths": "Tokens of each sample of the pack, in order.",
    "sample_ids": "Identity of each sample of the pack, in order.",
}


def contracts() -> dict[str, str]:
    """File name and content of every contract."""
    documents = {f"{name}.schema.json": _json_schema(kind, mode) for name, (kind, mode) in MODELS.items()}
    documents["artefacts.json"] = {"format_version": FORMAT_VERSION, "artefacts": _artefacts()}
    texts = {
        name: json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        for name, document in documents.items()
    }
    return {**texts, "views.sql": _views()}


def write_contracts(into: Path) -> None:
    """Make the folder `into` hold exactly the contracts."""
    current = contracts()
    for path in into.iterdir():
        if path.name not in current:
            path.unlink()
    for name, text in current.items():
        (into / name).write_text(text, encoding="utf-8")


def _json_schema(kind: Any, mode: Mode) -> dict[str, Any]:
    return {"$schema": DIALECT, **TypeAdapter(kind).json_schema(mode=mode)}


def _artefacts() -> dict[str, Any]:
    return {
        name: {
            "place": PLACES[name],
            "columns": [
                {
                    "name": field.name,
                    "type": _type_name(field.type),
                    "nullable": field.nullable,
                    "meaning": MEANINGS.get(f"{name}.{field.name}") or MEANINGS[field.name],
                }
                for field in schema
            ],
        }
        for name, schema in ARTEFACTS.items()
    }


def _type_name(kind: pa.DataType) -> str:
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)


def _views() -> str:
    statements = view_statements(_canonical_manifest(), "STORE")
    lines = [
        "-- The views `pear-data sql` queries, as made for a store with one shard, the policies initial and behavior",
        "-- and the weighting block. Other policies and weightings add their columns; a missing one leaves them out.",
        "-- Columns that name no weighting are those of block if there is one, else of the first made.",
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(f"{statement};" for statement in statements) + "\n"


def _canonical_manifest() -> Manifest:
    def file(path: str) -> FileEntry:
        return FileEntry(path=path, bytes=0, sha256="")

    def stage(key: str) -> Stage:
        name = "part-00000"
        weights = key.startswith("weights/")
        shard = Shard(
            name=name,
            file=file(f"{key}/{name}.parquet"),
            summary=file(f"summary/{key}/{name}.parquet") if weights or key == "corpus" else None,
            totals=file(f"summary/{key}/{name}.totals.parquet") if weights else None,
            rows=0,
            num_tokens=0,
            num_scored=0,
        )
        return Stage(settings={}, fingerprint="", complete=True, shards=[shard])

    keys = ("corpus", "scores/initial", "scores/behavior", "weights/block")
    vocabulary = file("tokenizer/vocabulary.parquet")
    return Manifest(
        created_by="",
        tokenizer=TokenizerEntry(
            name="", fingerprint="", template_fingerprint="", files=[], vocabulary=vocabulary
        ),
        stages={key: stage(key) for key in keys},
    )


if __name__ == "__main__":
    write_contracts(folder("schemas"))
