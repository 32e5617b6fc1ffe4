"""Spans of scored tokens that two policies can be compared on, where one of them has another tokenizer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.store.columns import flat_values
from pear_data.store.manifest import Manifest
from pear_data.weighting import common_spans

ALIGNED_BY_BYTES = "aligned_by_bytes"

SpanLengths = npt.NDArray[np.int64]


def spanned_policies(manifest: Manifest, *policies: str) -> list[str]:
    """Those of `policies` that were scored on tokens of their own (`--align bytes`)."""
    return [name for name in policies if manifest.stages[f"scores/{name}"].settings.get("align") == "bytes"]


def compared_spans(target: pa.Table, behavior: pa.Table) -> SpanLengths | None:
    """Scored tokens of each span of rows of two policies, flat over the rows; None where both share the ids.

    All rows have log-probs.
    """
    return agreed_spans(
        *(
            None if table["span_tokens"].null_count == len(table) else flat_values(table["span_tokens"])
            for table in (target, behavior)
        )
    )


def agreed_spans(first: npt.ArrayLike | None, second: npt.ArrayLike | None) -> SpanLengths | None:
    """The span lengths of two policies, None where a policy has none; where both have, the smallest spans that are
    whole spans of both."""
    given = [np.asarray(lengths, dtype=np.int64) for lengths in (first, second) if lengths is not None]
    if len(given) == 2:
        return common_spans(*given)
    return given[0] if given else None
