"""Log-ratios where policies read the text with different tokenizers, as a function that SQL can call.

The compiled loop is loaded with the first call: most stores need none.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pear_data.schema import DOUBLES
from pear_data.store.columns import flat_values, list_column, list_lengths
from pear_data.weighting import common_spans


def span_log_ratios(
    target: pa.Array, behavior: pa.Array, target_spans: pa.Array, behavior_spans: pa.Array
) -> pa.ListArray:
    """Unclipped log-ratios of many samples' scored tokens, each span's evenly spread over its tokens.

    Args:
        target: log-probs of each sample's tokens, list<float>; null where the policy has none.
        behavior: the same.
        target_spans: tokens of each span, list<int32>; null where the tokens are the policy's own.
        behavior_spans: the same.

    Returns:
        list<double>, null where either policy's log-probs are.
    """
    from pear_data.store.span_kernel import spread

    columns = [_whole(column) for column in (target, behavior, target_spans, behavior_spans)]
    known = np.asarray(pc.and_(pc.is_valid(columns[0]), pc.is_valid(columns[1])))
    lengths = np.where(known, list_lengths(columns[0]), 0)
    if not known.all():
        columns = [column.filter(pa.array(known)) for column in columns]
    target_N, behavior_N = (flat_values(column) for column in columns[:2])
    spans = [flat_values(column) for column in columns[2:] if column.null_count < len(column)]
    if len(spans) == 2:
        spans = [common_spans(*spans)]
    if not spans:
        ratios = np.subtract(target_N, behavior_N, dtype=np.float64)
    else:
        ratios = np.empty(len(target_N))
        spread(target_N, behavior_N, spans[0], ratios)
    return list_column(ratios, lengths, DOUBLES, known)


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
