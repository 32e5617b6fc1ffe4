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
from pear_data.stages.export import ExportManifest
from pear_data.stages.statistics import WeightingStatistics
from pear_data.store.manifest import FileEntry, Manifest, Shard, Stage, TokenizerEntry
from pear_data.store.view_sql import view_statements

Mode = Literal["validation", "serialization"]
DIALECT = "https://json-schema.org/draft/2020-12/schema"

# File name: (type, "serialization" for what pear-data writes, "validation" for what people write).
MODELS: dict[str, tuple[Any, Mode]] = {
    "manifest": (Manifest, "serialization"),
    "statistics": (list[WeightingStatistics], "serialization"),
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
    "scores": "STORE/scores/POLICY/part-NNNNN.parquet",
    "weights": "STORE/weights/NAME/part-NNNNN.parquet",
    "quarantine": "STORE/quarantine/corpus-part-NNNNN.parquet",
    "vocabulary": "STORE/tokenizer/vocabulary.parquet",
    "export_hf": "OUT/train-NNNNN.parquet",
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
    "log_ratio_sum": "Sum of the unclipped log-ratios, target minus behavior.",
    "weight_mean": "Mean of weights.",
    "weight_min": "Least of weights.",
    "weight_max": "Greatest of weights.",
    "ess": "Effective sample size of weights: (sum w)^2 / sum w^2.",
    "clipped_low": "Scored tokens whose log-ratio is below the lower clip.",
    "clipped_high": "Scored tokens whose log-ratio is above the upper clip.",
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
        shard = Shard(name=name, file=file(f"{key}/{name}.parquet"), rows=0, num_tokens=0, num_scored=0)
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
