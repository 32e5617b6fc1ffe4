"""The views over a weighting's totals: `histograms` and `deciles`. No sample is read for them."""

from __future__ import annotations

import pyarrow as pa

from pear_data.schema import DECILES, WEIGHT_TOTALS
from pear_data.store.manifest import Manifest
from pear_data.store.shown import shown_weightings
from pear_data.store.sql_text import from_query, literal, no_rows, quoted, select, type_name

QUANTITIES = ("log_ratio", "weight", "sample_weight")
BY_DECILE = [
    field.name
    for field in WEIGHT_TOTALS
    if pa.types.is_list(field.type) and not field.name.endswith(("_bins", "_counts"))
]

# A float32 from its exponent and mantissa (the last 7 bits of the first 16, or all 23 of them), its sign aside.
_FLOAT = "CASE WHEN {bits} < 128 THEN {mantissa} * 2.0 ** -126 ELSE (1 + {mantissa}) * 2.0 ** (({bits} >> 7) - 127) END"


def histograms_view(manifest: Manifest) -> str:
    """One row per weighting, source, quantity and bin that holds any."""
    parts = [
        f"SELECT {literal(name)} AS name, source, {literal(quantity)} AS quantity, "
        f"unnest({quantity}_bins) AS bin, unnest({quantity}_counts) AS count\n"
        f"FROM stored.{quoted(f'totals/weights/{name}')}"
        for name in shown_weightings(manifest)
        for quantity in QUANTITIES
    ]
    if not parts:
        kinds = {"name": pa.string(), "source": pa.string(), "quantity": pa.string()}
        return no_rows(pa.schema({**kinds, "value": pa.float64(), "count": pa.int64()}))
    columns = ["name", "source", "quantity", f"{middle('bin')} AS value", "sum(count)::BIGINT AS count"]
    return select(columns, f"{from_query(_stacked(parts), 'b')}\nGROUP BY name, source, quantity, bin")


def deciles_view(manifest: Manifest) -> str:
    """One row per weighting, source and tenth of its samples' scored tokens: 1 is the first."""
    unnested = ", ".join(f"unnest({name}) AS {name}" for name in BY_DECILE)
    parts = [
        f"SELECT {literal(name)} AS name, source, unnest(range(1, {DECILES + 1}))::INTEGER AS decile, {unnested}\n"
        f"FROM stored.{quoted(f'totals/weights/{name}')}"
        for name in shown_weightings(manifest)
    ]
    if not parts:
        sums = {name: WEIGHT_TOTALS.field(name).type.value_type for name in BY_DECILE}
        return no_rows(pa.schema({"name": pa.string(), "source": pa.string(), "decile": pa.int32(), **sums}))
    columns = [_sum(name) for name in BY_DECILE]
    grouped = f"{from_query(_stacked(parts), 'd')}\nGROUP BY name, source, decile"
    return select(["name", "source", "decile", *columns], grouped)


def _stacked(parts: list[str]) -> str:
    return "\nUNION ALL\n".join(parts)


def _sum(name: str) -> str:
    kind = type_name(WEIGHT_TOTALS.field(name).type.value_type)
    total = f"sum({name})::{kind}"
    # A baseline knows one policy only: NaN stands for the other's sums.
    known = f"nullif({total}, 'nan')" if kind == "DOUBLE" else total
    return f"{known} AS {name}"


def middle(bin_column: str) -> str:
    """The middle of a bin in SQL: `pear_data.binning.middles_of` in arithmetic.

    A bin is the first 16 bits of a float32, numbered in ascending order; a negative number's are complemented, and its
    last 16 bits are ones.
    """
    positive, negative = f"({bin_column} - 32768)", f"(32767 - {bin_column})"
    above = _FLOAT.format(bits=positive, mantissa=f"({positive} & 127) / 128")
    below = _FLOAT.format(bits=negative, mantissa=f"(({negative} & 127) * 65536 + 65535) / 8388608")
    return f"CASE WHEN {bin_column} >= 32768 THEN {above} ELSE -({below}) END"
