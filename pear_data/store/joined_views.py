"""The views that join artefacts: `weights`, `samples` and `tokens`.

DuckDB reads both sides of a join even where a query asks for no column of one, and unnests lists that no one looks at.
So every column here names the artefacts and lists it is made of, and a view can be written with only the columns a
query can see.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import pyarrow as pa

from pear_data.schema import WEIGHT_SUMMARY
from pear_data.schema import WEIGHTS as WEIGHTS_SCHEMA
from pear_data.store.manifest import CORPUS, Manifest
from pear_data.store.shown import compared_policies, default_weighting, shown_weightings
from pear_data.store.sql_text import from_query, literal, no_rows, quoted, select, type_name

# The name that SQL calls `span_ratios.span_log_ratios` by.
SPAN_LOG_RATIOS = "span_log_ratios"

_KEPT = (
    "log_ratio_sum",
    "weight_sum",
    "weight_square_sum",
    "weight_min",
    "weight_max",
    "clipped_low",
    "clipped_high",
    "saturated_low",
    "saturated_high",
)
# A vocabulary has a row for every id from 0. DuckDB takes unnested tokens for few, and would hash them all for a join.
_TOKEN = "(SELECT list(token ORDER BY token_id) FROM stored.vocabulary)[s.token_id + 1]"

# Of a weighting's summary, alias {0}. A sample whose weights are all 0 has no effective sample.
_SUMMARY = {
    **{name: f"{{0}}.{name}" for name in _KEPT},
    "weight_mean": "{0}.weight_sum / nullif({0}.num_scored, 0)",
    "ess": "CASE WHEN {0}.weight_square_sum = 0 THEN 0 ELSE {0}.weight_sum ** 2 / {0}.weight_square_sum END",
}
SUMMARY = (
    "log_ratio_sum",
    "weight_mean",
    "weight_min",
    "weight_max",
    "ess",
    "clipped_low",
    "clipped_high",
    "saturated_low",
    "saturated_high",
    "weight_sum",
    "weight_square_sum",
)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a view: its name, what it is in SQL, and the joined tables (by alias) and unnested lists (by name)
    that this takes."""

    name: str
    sql: str
    tables: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return f"{self.sql} AS {quoted(self.name)}"


def summary_kind(name: str) -> str:
    """DuckDB's type of a column of SUMMARY."""
    return type_name(WEIGHT_SUMMARY.field(name).type) if name in WEIGHT_SUMMARY.names else "DOUBLE"


def weights_view(manifest: Manifest, seen: Collection[str] | None = None) -> str:
    """One row per sample and weighting. `seen` are the columns to write, all by default; so in the other views."""
    columns = [
        Column("sample_id", "s.sample_id"),
        Column("weights", "w.weights", ("w",)),
        Column("num_scored", "s.num_scored"),
        *(Column(name, _SUMMARY[name].format("s")) for name in SUMMARY),
        Column("status", "s.status"),
    ]
    kept = _kept(columns, seen)
    parts = []
    for name in shown_weightings(manifest):
        joins = {"w": f"weights/{name}"}
        rest = _joined(f"summary/weights/{name}", "s", joins, kept)
        parts.append(select([f"{literal(name)} AS name", *(column.text for column in kept)], rest))
    return "\nUNION ALL\n".join(parts) or no_rows(_weights_columns())


def samples_view(manifest: Manifest, seen: Collection[str] | None = None) -> str:
    """One row per sample; of its tokens nothing is opened."""
    policies, weightings = _aliases(manifest)
    columns = [
        Column(name, f"c.{name}") for name in ("sample_id", "source", "label", "num_tokens", "num_scored")
    ]
    for name, alias in policies.items():
        perplexity = f"exp(-{alias}.logprob_sum / nullif(c.num_scored, 0))"
        columns += [
            Column(f"logprob_sum_{name}", f"{alias}.logprob_sum", (alias,)),
            Column(f"perplexity_{name}", perplexity, (alias,)),
            Column(f"status_{name}", f"{alias}.status", (alias,)),
        ]
    default = default_weighting(manifest)
    if default:
        columns += _summary_columns(weightings[default], "")
    else:
        columns += [Column(name, f"NULL::{summary_kind(name)}") for name in SUMMARY]
        columns.append(Column("weight_status", "NULL::VARCHAR"))
    for name, alias in weightings.items():
        columns += _summary_columns(alias, f"_{name}")
    kept = _kept(columns, seen)
    joins = {alias: f"scores/{name}" for name, alias in policies.items()}
    joins |= {alias: f"summary/weights/{name}" for name, alias in weightings.items()}
    rest = _joined(f"summary/{CORPUS}", "c", joins, kept)
    return select((column.text for column in kept), rest)


def tokens_view(manifest: Manifest, seen: Collection[str] | None = None) -> str:
    """One row per scored token."""
    policies, weightings = _aliases(manifest)
    lists = {
        "position": Column(
            "position", "unnest(list_where(range(k.num_tokens), k.loss_mask))::INTEGER", ("k",)
        ),
        "token_id": Column("token_id", "unnest(list_where(k.input_ids, k.loss_mask))", ("k",)),
    }
    for name, alias in policies.items():
        lists[f"logprob_{name}"] = Column(f"logprob_{name}", f"unnest({alias}.logprobs)", (alias,))
    for name, alias in weightings.items():
        lists[f"weight_{name}"] = Column(f"weight_{name}", f"unnest({alias}.weights)", (alias,))
    log_ratio, of_spans = _log_ratio(manifest, policies)
    lists |= {column.name: column for column in of_spans}
    columns = [
        *(Column(name, f"s.{name}") for name in ("sample_id", "source")),
        Column("position", "s.position", lists=("position",)),
        Column("t", "s.t"),
        Column("token_id", "s.token_id", lists=("token_id",)),
        Column("token", _TOKEN, lists=("token_id",)),
        *(_unnested(f"logprob_{name}", f"logprob_{name}") for name in policies),
        log_ratio,
    ]
    default = default_weighting(manifest)
    columns.append(_unnested("weight", f"weight_{default}") if default else Column("weight", "NULL::FLOAT"))
    columns += [_unnested(f"weight_{name}", f"weight_{name}") for name in weightings]

    kept = _kept(columns, seen)
    wanted = {name for column in kept for name in column.lists}
    unnested = [column for name, column in lists.items() if name in wanted]
    # DuckDB streams what is joined first and keeps the rest in memory: the largest goes first.
    by_size = sorted(policies, key=lambda name: not _has_spans(manifest, name))
    joins = {"k": CORPUS} | {policies[name]: f"scores/{name}" for name in by_size}
    joins |= {alias: f"weights/{name}" for name, alias in weightings.items()}
    inner = select(
        # All other lists may be null: this one makes the rows.
        ["c.sample_id", "c.source", "unnest(range(1, c.num_scored + 1))::INTEGER AS t"]
        + [column.text for column in unnested],
        _joined(f"summary/{CORPUS}", "c", joins, unnested),
    )
    return select((column.text for column in kept), from_query(inner, "s"))


def _log_ratio(manifest: Manifest, policies: dict[str, str]) -> tuple[Column, list[Column]]:
    """The column, and the list to unnest for it where a policy has spans of tokens."""
    compared = compared_policies(manifest)
    if not set(compared) <= policies.keys():
        return Column("log_ratio", "NULL::DOUBLE"), []
    if any(_has_spans(manifest, name) for name in compared):
        target, behavior = (policies[name] for name in compared)
        logprobs = f"{target}.logprobs, {behavior}.logprobs"
        spans = (
            f"{policies[name]}.span_tokens" if _has_spans(manifest, name) else "NULL" for name in compared
        )
        unnested = f"unnest({SPAN_LOG_RATIOS}({logprobs}, {', '.join(spans)}))"
        return _unnested("log_ratio", "log_ratio"), [Column("log_ratio", unnested, (target, behavior))]
    lists = [f"logprob_{name}" for name in compared]
    # In double: both are float32, and the log-ratio is what is left of two nearly equal numbers.
    difference = " - ".join(f"s.{quoted(name)}::DOUBLE" for name in lists)
    return Column("log_ratio", difference, lists=tuple(lists)), []


def _has_spans(manifest: Manifest, policy: str) -> bool:
    return manifest.stages[f"scores/{policy}"].settings.get("align") == "bytes"


def _unnested(name: str, made_of: str) -> Column:
    return Column(name, f"s.{quoted(made_of)}", lists=(made_of,))


def _summary_columns(alias: str, suffix: str) -> list[Column]:
    columns = [Column(f"{name}{suffix}", _SUMMARY[name].format(alias), (alias,)) for name in SUMMARY]
    return [*columns, Column(f"weight_status{suffix}", f"{alias}.status", (alias,))]


def _kept(columns: list[Column], seen: Collection[str] | None) -> list[Column]:
    """The columns in `seen`, and always the first, as there must be one."""
    if seen is None:
        return columns
    return [column for column in columns if column is columns[0] or column.name.lower() in seen]


def _joined(base: str, alias: str, joins: dict[str, str], columns: Iterable[Column]) -> str:
    """FROM the artefact `base`, joined with those of `joins` (artefact by alias) that the columns take."""
    taken = {table for column in columns for table in column.tables}
    lines = [
        f"LEFT JOIN stored.{quoted(key)} AS {joined} ON {joined}.sample_id = {alias}.sample_id"
        for joined, key in joins.items()
        if joined in taken
    ]
    return "\n".join([f"FROM stored.{quoted(base)} AS {alias}", *lines])


def _aliases(manifest: Manifest) -> tuple[dict[str, str], dict[str, str]]:
    """Table aliases of each policy's scores and of each weighting."""
    policies = {name: f"p{index}" for index, name in enumerate(manifest.names("scores"))}
    weightings = {name: f"w{index}" for index, name in enumerate(shown_weightings(manifest))}
    return policies, weightings


def _weights_columns() -> pa.Schema:
    """Columns of the view `weights` where there is no weighting."""
    summary = [
        WEIGHT_SUMMARY.field(name) if name in WEIGHT_SUMMARY.names else pa.field(name, pa.float64())
        for name in SUMMARY
    ]
    first = [WEIGHTS_SCHEMA.field(name) for name in ("sample_id", "weights", "num_scored")]
    return pa.schema([pa.field("name", pa.string()), *first, *summary, WEIGHTS_SCHEMA.field("status")])
