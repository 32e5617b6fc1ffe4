"""What `sql` lets through: one statement that reads; and which columns it can see.

DuckDB's configuration alone is not enough: a path that may be read may also be written, and a SELECT can hold a
COPY in its WITH clause or run a string through a table function. So the parsed statement is walked, and holds only
the query nodes and table functions named here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb

from pear_data.errors import UsageError

_QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_TABLE_FUNCTIONS = {"range", "generate_series", "unnest", "repeat", "summary", "json_each", "json_tree"}
_ALLOWED = "one SELECT, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN of one"


@dataclass(frozen=True, slots=True)
class Query:
    """A query that only reads, and the words in it that can name a table or a column, in lower case.

    `columns` is None where it may take columns that it does not name (`*`, say), or tables.
    """

    text: str
    tables: frozenset[str]
    columns: frozenset[str] | None


def check(query: str, parser: duckdb.DuckDBPyConnection) -> Query:
    """The query, if it is one statement that only reads.

    Args:
        query: what somebody wrote.
        parser: any connection without an open result.

    Raises:
        UsageError: it is not, or does not parse; says what was refused.
    """
    kinds = _kinds(query)
    if len(kinds) != 1:
        raise UsageError(f"the query holds {len(kinds)} statements: give {_ALLOWED}")
    read = query
    if kinds == ["EXPLAIN"]:
        read = _explained(query)
        kinds = _kinds(read)
    if kinds != ["SELECT"]:
        hint = "; a PIVOT must list its values with IN" if kinds == ["MULTI"] else ""
        raise UsageError(f"{kinds[0] if kinds else 'nothing'} is refused: give {_ALLOWED}{hint}")
    nodes = list(_nodes(_parsed(read, parser)))
    _check_nodes(nodes)
    return Query(query, frozenset(_tables(nodes)), _columns(nodes))


def rows_where(select: str, predicate: str, parser: duckdb.DuckDBPyConnection) -> str:
    """`select WHERE predicate`, if whether a row of `select` (SELECT ... FROM ...) is taken depends on it alone.

    Raises:
        UsageError: the predicate does not parse, or is more than a condition on one row (a subquery, a LIMIT).
    """

    def around(condition: str) -> str:
        return f"{select} WHERE (\n{condition}\n)"

    query = around(predicate)
    check(query, parser)
    parsed = _parsed(query, parser)
    if any(node.get("class") == "SUBQUERY" for node in _nodes(parsed)) or _frame(parsed) != _frame(
        _parsed(around("true"), parser)
    ):
        raise UsageError(
            f"{predicate!r} is no condition on the columns of one sample: give one as after WHERE, without SELECT"
        )
    return query


def _frame(tree: Any) -> Any:
    """The statement around the condition after WHERE."""
    return [{**statement["node"], "where_clause": None} for statement in tree["statements"]]


def first_line(error: Exception) -> str:
    """DuckDB's message without the hints and the pointer into the query below it."""
    return str(error).splitlines()[0]


def _kinds(query: str) -> list[str]:
    try:
        return [statement.type.name for statement in duckdb.extract_statements(query)]
    except duckdb.Error as error:
        raise UsageError(f"the query does not parse: {first_line(error)}") from None
    except ValueError:  # a kind that DuckDB has and its Python module has no name for
        raise UsageError(f"this kind of statement is refused: give {_ALLOWED}") from None


def _explained(query: str) -> str:
    """What an EXPLAIN statement explains (and, with ANALYZE, runs)."""
    # DuckDB counts in bytes.
    encoded = query.encode()
    starts = [offset for offset, kind in duckdb.tokenize(query) if kind != duckdb.token_type.comment]
    tokens = [
        encoded[start:end].decode(errors="replace").split(maxsplit=1)[0].lower()
        for start, end in zip(starts, [*starts[1:], len(encoded)], strict=True)
    ]
    first = 1
    if first < len(tokens) and tokens[first] == "analyze":
        first += 1
    if first < len(tokens) and tokens[first].startswith("("):
        raise UsageError("EXPLAIN takes no options here: give EXPLAIN or EXPLAIN ANALYZE and one SELECT")
    return encoded[starts[first] :].decode()


def _parsed(query: str, parser: duckdb.DuckDBPyConnection) -> Any:
    (text,) = parser.execute("SELECT json_serialize_sql($1::VARCHAR)", [query]).fetchall()[0]
    tree = json.loads(text)
    if tree["error"]:
        raise UsageError(f"the query is refused ({tree['error_message']}): give {_ALLOWED}")
    return tree


def _check_nodes(nodes: list[dict[str, Any]]) -> None:
    for node in nodes:
        kind = node.get("type")
        if isinstance(kind, str) and kind.endswith("_NODE") and kind not in _QUERY_NODES:
            raise UsageError(f"{kind.removesuffix('_QUERY_NODE')} is refused: give {_ALLOWED}")
        if kind == "TABLE_FUNCTION":
            name = node["function"].get("function_name", "")
            if name.lower() not in _TABLE_FUNCTIONS:
                raise UsageError(
                    f"{name}() is refused: query the views corpus, scores, weights, samples, tokens, histograms and "
                    "deciles"
                )


def _tables(nodes: list[dict[str, Any]]) -> set[str]:
    named = [node for node in nodes if node.get("type") == "BASE_TABLE"]
    return {node[key].lower() for node in named for key in ("table_name", "alias")}


def _columns(nodes: list[dict[str, Any]]) -> frozenset[str] | None:
    """Every word of the query that can name a column, or None where it can also take one without its name."""
    words: set[str] = set()
    last: set[str] = set()
    for node in nodes:
        kind = node.get("type")
        # `*`, COLUMNS(...), DESCRIBE, PIVOT and `FROM view` are all stars to the parser; `#1` counts columns.
        if kind in ("STAR", "POSITIONAL_REFERENCE") or node.get("column_name_alias"):
            return None
        if node.get("ref_type") == "NATURAL":
            return None
        if kind == "BASE_TABLE" and len(node["qualified_name"]["path"]) > 1:
            return None  # information_schema.columns, say
        if kind == "COLUMN_REF":
            names = [name.lower() for name in node["column_names"]]
            words.update(names)
            last.add(names[-1])
        words.update(name.lower() for name in node.get("using_columns") or ())
    # A table's name in a column's place is a whole row.
    return None if _tables(nodes) & last else frozenset(words)


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON tree. No recursion: a query may nest deeper than Python's stack."""
    left = [tree]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
