"""The SQL of the views over a store: the text a query sees, made from the manifest alone.

One view per committed stage lies in the schema `stored`; the public views join them. A stage that is missing leaves
its columns null, a missing corpus leaves no rows: every view exists in every store.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from pear_data.config import BEHAVIOR, INITIAL
from pear_data.schema import CORPUS as CORPUS_SCHEMA
from pear_data.schema import SCORES as SCORES_SCHEMA
from pear_data.schema import VOCABULARY as VOCABULARY_SCHEMA
from pear_data.schema import WEIGHTS as WEIGHTS_SCHEMA
from pear_data.store.manifest import CORPUS, FileEntry, Manifest

PREFERRED_WEIGHTING = "block"
SUMMARY = ("log_ratio_sum", "weight_mean", "weight_min", "weight_max", "ess", "clipped_low", "clipped_high")

_TYPES = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.bool_(): "BOOLEAN",
    pa.int8(): "TINYINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
}


def default_weighting(manifest: Manifest) -> str | None:
    """The weighting behind the columns that name none: "block" if there is one, else the first made."""
    names = manifest.names("weights")
    return PREFERRED_WEIGHTING if PREFERRED_WEIGHTING in names else next(iter(names), None)


def compared_policies(manifest: Manifest) -> tuple[str, str]:
    """(target, behavior) of the default weighting, or the policies a weighting takes by default."""
    name = default_weighting(manifest)
    settings = manifest.stages[f"weights/{name}"].settings if name else {}
    return settings.get("target", INITIAL), settings.get("behavior", BEHAVIOR)


def view_statements(manifest: Manifest, root: str) -> list[str]:
    """The statements that make every view, in order. `root` is put before the paths of the manifest."""
    policies, weightings = manifest.names("scores"), manifest.names("weights")
    vocabulary = [manifest.tokenizer.vocabulary] if manifest.tokenizer else []
    stored = [
        ("corpus", CORPUS_SCHEMA, _files(manifest, CORPUS)),
        ("vocabulary", VOCABULARY_SCHEMA, vocabulary),
        *((f"scores/{name}", SCORES_SCHEMA, _files(manifest, f"scores/{name}")) for name in policies),
        *((f"weights/{name}", WEIGHTS_SCHEMA, _files(manifest, f"weights/{name}")) for name in weightings),
    ]
    views = {
        **{f"stored.{quoted(key)}": _read(schema, files, root) for key, schema, files in stored},
        "corpus": f"SELECT {', '.join(CORPUS_SCHEMA.names)}\nFROM stored.corpus",
        "scores": _stacked("policy", "scores", policies, SCORES_SCHEMA),
        "weights": _stacked("name", "weights", weightings, WEIGHTS_SCHEMA),
        "samples": _samples(manifest),
        "tokens": _tokens(manifest),
    }
    return [
        "CREATE SCHEMA stored",
        *(f"CREATE VIEW {name} AS\n{body}" for name, body in views.items()),
    ]


def quoted(identifier: str) -> str:
    """An SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


def literal(text: str) -> str:
    """An SQL string."""
    return "'" + text.replace("'", "''") + "'"


def _files(manifest: Manifest, key: str) -> list[FileEntry]:
    return [shard.file for shard in manifest.stages[key].shards] if key in manifest.stages else []


def _read(schema: pa.Schema, files: Iterable[FileEntry], root: str) -> str:
    paths = [literal(f"{root}/{entry.path}") for entry in files]
    if not paths:
        return _no_rows(schema)
    listed = ",\n    ".join(paths)
    # A folder of the user's called label=1 must not become a column.
    return (
        f"SELECT {', '.join(schema.names)}\nFROM read_parquet([\n    {listed}\n], hive_partitioning = false)"
    )


def _no_rows(schema: pa.Schema) -> str:
    columns = ", ".join(f"NULL::{_type(field.type)} AS {field.name}" for field in schema)
    return f"SELECT {columns}\nWHERE false"


def _type(kind: pa.DataType) -> str:
    return f"{_TYPES[kind.value_type]}[]" if pa.types.is_list(kind) else _TYPES[kind]


def _stacked(column: str, kind: str, names: list[str], schema: pa.Schema) -> str:
    parts = [
        f"SELECT {literal(name)} AS {column}, {', '.join(schema.names)}\nFROM stored.{quoted(f'{kind}/{name}')}"
        for name in names
    ]
    return "\nUNION ALL\n".join(parts) or _no_rows(pa.schema([pa.field(column, pa.string()), *schema]))


def _aliases(manifest: Manifest) -> tuple[dict[str, str], dict[str, str]]:
    """Table aliases of each policy's scores and of each weighting."""
    policies = {name: f"p{index}" for index, name in enumerate(manifest.names("scores"))}
    weightings = {name: f"w{index}" for index, name in enumerate(manifest.names("weights"))}
    return policies, weightings


def _joined(manifest: Manifest) -> str:
    policies, weightings = _aliases(manifest)
    joins = [(f"scores/{name}", alias) for name, alias in policies.items()]
    joins += [(f"weights/{name}", alias) for name, alias in weightings.items()]
    lines = [
        f"LEFT JOIN stored.{quoted(key)} AS {alias} ON {alias}.sample_id = c.sample_id"
        for key, alias in joins
    ]
    return "\n".join(["FROM stored.corpus AS c", *lines])


def _samples(manifest: Manifest) -> str:
    policies, weightings = _aliases(manifest)
    columns = [f"c.{name}" for name in ("sample_id", "source", "label", "num_tokens", "num_scored")]
    for name, alias in policies.items():
        columns += [
            f"{alias}.logprob_sum AS {quoted(f'logprob_sum_{name}')}",
            f"exp(-{alias}.logprob_sum / nullif(c.num_scored, 0)) AS {quoted(f'perplexity_{name}')}",
            f"{alias}.status AS {quoted(f'status_{name}')}",
        ]
    default = default_weighting(manifest)
    for column in (*SUMMARY, "status"):
        shown = "weight_status" if column == "status" else column
        kind = _type(WEIGHTS_SCHEMA.field(column).type)
        columns.append(
            f"{weightings[default]}.{column} AS {shown}" if default else f"NULL::{kind} AS {shown}"
        )
    for name, alias in weightings.items():
        columns += [f"{alias}.{column} AS {quoted(f'{column}_{name}')}" for column in SUMMARY]
        columns.append(f"{alias}.status AS {quoted(f'weight_status_{name}')}")
    return _select(columns, _joined(manifest))


def _tokens(manifest: Manifest) -> str:
    policies, weightings = _aliases(manifest)
    unnested = [
        "unnest(list_where(range(c.num_tokens), c.loss_mask))::INTEGER AS position",
        "unnest(range(1, c.num_scored + 1))::INTEGER AS t",
        "unnest(list_where(c.input_ids, c.loss_mask)) AS token_id",
        *(f"unnest({alias}.logprobs) AS {quoted(f'logprob_{name}')}" for name, alias in policies.items()),
        *(f"unnest({alias}.weights) AS {quoted(f'weight_{name}')}" for name, alias in weightings.items()),
    ]
    compared = compared_policies(manifest)
    default = default_weighting(manifest)
    columns = ["s.sample_id", "s.source", "s.position", "s.t", "s.token_id", "v.token"]
    columns += [f"s.{quoted(f'logprob_{name}')}" for name in policies]
    spanned = [name for name in compared if name in policies and _has_spans(manifest, name)]
    unnested += [f"unnest({_span_ends(policies[name])}) AS {quoted(f'span_end_{name}')}" for name in spanned]
    log_ratio = _log_ratio(*compared) if set(compared) <= policies.keys() else "NULL::DOUBLE"
    columns.append(f"{_over_spans(log_ratio) if spanned else log_ratio} AS log_ratio")
    columns.append(f"s.{quoted(f'weight_{default}')} AS weight" if default else "NULL::FLOAT AS weight")
    columns += [f"s.{quoted(f'weight_{name}')}" for name in weightings]
    inner = _select(["c.sample_id", "c.source", *unnested], _joined(manifest))
    if spanned:
        inner = _select(["*", f"{_span_number(spanned)} AS span"], _from(inner, "u"))
    return _select(
        columns, f"{_from(inner, 's')}\nLEFT JOIN stored.vocabulary AS v ON v.token_id = s.token_id"
    )


def _log_ratio(target: str, behavior: str) -> str:
    # In double: both are float32, and the log-ratio is what is left of two nearly equal numbers.
    return f"s.{quoted(f'logprob_{target}')}::DOUBLE - s.{quoted(f'logprob_{behavior}')}::DOUBLE"


def _has_spans(manifest: Manifest, policy: str) -> bool:
    return manifest.stages[f"scores/{policy}"].settings.get("align") == "bytes"


def _span_ends(alias: str) -> str:
    """Whether each scored token is the last of its span."""
    one_span = "list_concat(list_resize([]::BOOLEAN[], n - 1, false), [true])"
    return f"flatten([{one_span} for n in {alias}.span_tokens])"


def _span_number(policies: Iterable[str]) -> str:
    """The spans that end before a token, where all the policies' spans end."""
    ends = " AND ".join(quoted(f"span_end_{name}") for name in policies)
    before = "PARTITION BY sample_id ORDER BY t ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING"
    return f"count(*) FILTER (WHERE {ends}) OVER ({before})"


def _over_spans(log_ratio: str) -> str:
    """A span's log-ratio, spread evenly over its tokens."""
    return f"avg({log_ratio}) OVER (PARTITION BY s.sample_id, s.span)"


def _from(inner: str, alias: str) -> str:
    indented = inner.replace("\n", "\n  ")
    return f"FROM (\n  {indented}\n) AS {alias}"


def _select(columns: Iterable[str], rest: str) -> str:
    listed = ",\n  ".join(columns)
    return f"SELECT\n  {listed}\n{rest}"
