"""The SQL of the views over a store: the text a query sees, made from the manifest alone.

One view per committed artefact lies in the schema `stored`; the public views join them. A stage that is missing leaves
its columns null, a missing corpus leaves no rows: every view exists in every store.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pyarrow as pa

from pear_data.schema import CORPUS as CORPUS_SCHEMA
from pear_data.schema import CORPUS_SUMMARY, WEIGHT_SUMMARY, WEIGHT_TOTALS
from pear_data.schema import SCORES as SCORES_SCHEMA
from pear_data.schema import VOCABULARY as VOCABULARY_SCHEMA
from pear_data.schema import WEIGHTS as WEIGHTS_SCHEMA
from pear_data.store.joined_views import samples_view, tokens_view, weights_view
from pear_data.store.manifest import CORPUS, FileEntry, Manifest, Shard
from pear_data.store.shown import compared_policies, default_weighting, shown_weightings
from pear_data.store.sql_text import literal, no_rows, quoted
from pear_data.store.totals_views import deciles_view, histograms_view

__all__ = [
    "compared_policies",
    "create_view",
    "default_weighting",
    "file_view_statements",
    "joined_views",
    "literal",
    "quoted",
    "view_statements",
    "viewed_files",
]


def view_statements(manifest: Manifest, root: str) -> list[str]:
    """The statements that make every view, in order. `root` is put before the paths of the manifest."""
    return [
        *file_view_statements(manifest, root),
        *(create_view(name, body) for name, body in joined_views(manifest).items()),
    ]


def file_view_statements(manifest: Manifest, root: str) -> list[str]:
    """The statements that make the views which read files, and those that only stack them: `corpus` and `scores`."""
    scores = [
        f"SELECT {literal(name)} AS policy, {_listed(SCORES_SCHEMA)}\nFROM stored.{quoted(f'scores/{name}')}"
        for name in manifest.names("scores")
    ]
    no_scores = no_rows(pa.schema([pa.field("policy", pa.string()), *SCORES_SCHEMA]))
    views = {
        **{f"stored.{quoted(key)}": _read(reads, root) for key, reads in _stored(manifest).items()},
        "corpus": f"SELECT {_listed(CORPUS_SCHEMA)}\nFROM stored.corpus",
        "scores": "\nUNION ALL\n".join(scores) or no_scores,
    }
    return ["CREATE SCHEMA stored", *(create_view(name, body) for name, body in views.items())]


def joined_views(manifest: Manifest, seen: Collection[str] | None = None) -> dict[str, str]:
    """Bodies of the other views, by name.

    Where `seen` (lower case) is given, those that join files have only these columns.
    """
    return {
        "weights": weights_view(manifest, seen),
        "samples": samples_view(manifest, seen),
        "tokens": tokens_view(manifest, seen),
        "histograms": histograms_view(manifest),
        "deciles": deciles_view(manifest),
    }


def create_view(name: str, body: str) -> str:
    """The statement that makes a view, in place of another of that name."""
    return f"CREATE OR REPLACE VIEW {name} AS\n{body}"


def viewed_files(manifest: Manifest) -> list[FileEntry]:
    """Every file the views read."""
    return [entry for schemas in _stored(manifest).values() for _, files in schemas for entry in files]


# What a stored view reads: files by their schema.
Reads = list[tuple[pa.Schema, list[FileEntry]]]


def _stored(manifest: Manifest) -> dict[str, Reads]:
    """What each view of the schema `stored` reads, by the name of the view."""
    corpus = _shards(manifest, CORPUS)
    vocabulary = [manifest.tokenizer.vocabulary] if manifest.tokenizer else []
    stored: dict[str, Reads] = {
        CORPUS: [(CORPUS_SCHEMA, [shard.file for shard in corpus])],
        # An earlier version's shards have no summary: the columns are read from the part.
        f"summary/{CORPUS}": [
            (CORPUS_SUMMARY, [shard.summary for shard in corpus if shard.summary]),
            (CORPUS_SUMMARY, [shard.file for shard in corpus if not shard.summary]),
        ],
        "vocabulary": [(VOCABULARY_SCHEMA, vocabulary)],
    }
    for name in manifest.names("scores"):
        key = f"scores/{name}"
        stored[key] = [(SCORES_SCHEMA, [shard.file for shard in _shards(manifest, key)])]
    for name in shown_weightings(manifest):
        key = f"weights/{name}"
        shards = _shards(manifest, key)
        stored[key] = [(WEIGHTS_SCHEMA, [shard.file for shard in shards])]
        stored[f"summary/{key}"] = [(WEIGHT_SUMMARY, [s.summary for s in shards if s.summary])]
        stored[f"totals/{key}"] = [(WEIGHT_TOTALS, [s.totals for s in shards if s.totals])]
    return stored


def _shards(manifest: Manifest, key: str) -> list[Shard]:
    return manifest.stages[key].shards if key in manifest.stages else []


def _read(reads: Reads, root: str) -> str:
    parts = [_read_files(schema, files, root) for schema, files in reads if files]
    return "\nUNION ALL\n".join(parts) or no_rows(reads[0][0])


def _read_files(schema: pa.Schema, files: Iterable[FileEntry], root: str) -> str:
    listed = ",\n    ".join(literal(f"{root}/{entry.path}") for entry in files)
    # A folder of the user's called label=1 must not become a column.
    return f"SELECT {_listed(schema)}\nFROM read_parquet([\n    {listed}\n], hive_partitioning = false)"


def _listed(schema: pa.Schema) -> str:
    return ", ".join(schema.names)
