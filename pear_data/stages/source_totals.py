"""Running sums of a shard's sources, from the sums of its samples and tokens to the rows of its totals file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data import kernels
from pear_data.binning import bins_of
from pear_data.schema import WEIGHT_STATUSES, WEIGHT_TOTALS
from pear_data.store.columns import list_column
from pear_data.weighting import GroupSums, SampleSums

# Histograms that are filled at one time; those of other sources are kept as the bins they use.
SLOTS = 32
# Log-ratios are bounded at this inside exp, so that a wild one shows as a huge number and not as infinity.
EXP_BOUND = 300.0
BIN_BITS = 16
# Parts of histograms that may wait to be added up: it costs about as much for one as for many.
WAITING = 64

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Values = npt.NDArray[np.float32]


class SourceTotals:
    """Totals of the S sources of one shard; memory is bounded by their number and the bins they use.

    Args:
        sources: their names; elsewhere they are numbered as they stand here.
        has_behavior: whether log-ratios are known.
    """

    def __init__(self, sources: list[str], has_behavior: bool) -> None:
        self._sources, self._has_behavior = sources, has_behavior
        count = len(sources)
        self._statuses = {status: np.zeros(count, np.int64) for status in WEIGHT_STATUSES}
        self._samples, self._negatives = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._mean, self._mean_square, self._ratio_square = np.zeros((3, count))
        self._minimum, self._maximum = (
            np.full((2, count), np.inf),
            np.full((2, count), -np.inf),
        )  # log-ratio, weight
        self._counts, self._sums = np.zeros((count, 5, 10), np.int64), np.zeros((count, 5, 10))
        # Codes that have a slot, in the slots' order, and the keys (code and bin) of all others with their counts.
        self._held: Codes = np.empty(0, np.int64)
        self._filling = GroupSums.zeros(min(SLOTS, count))
        self._kept: dict[str, list[tuple[Codes, Codes]]] = {
            "log_ratio": [],
            "weight": [],
            "sample_weight": [],
        }

    def count_rows(self, codes: Codes, status: npt.NDArray[np.int8], negative: npt.NDArray[np.bool_]) -> None:
        """Count rows [n] of sources `codes`; `status` are indices into WEIGHT_STATUSES."""
        for index, counts in enumerate(self._statuses.values()):
            counts += np.bincount(codes[status == index], minlength=len(counts))
        self._negatives += np.bincount(codes[negative], minlength=len(self._negatives))

    def sums_of(self, codes: Codes) -> tuple[Codes, GroupSums]:
        """The slots [n] of samples and the sums that `weigh` adds them to.

        Where these have no histograms, the samples are of too many sources for that, and `add_tokens` comes next.
        """
        distinct = np.unique(codes)
        if len(distinct) > SLOTS:
            return np.searchsorted(distinct, codes), GroupSums.zeros(len(distinct), histograms=False)
        fresh = np.setdiff1d(distinct, self._held)
        if len(self._held) + len(fresh) > SLOTS:
            self._keep()
            fresh = distinct
        self._held = np.concatenate((self._held, fresh))
        order = np.argsort(self._held)
        return order[np.searchsorted(self._held, codes, sorter=order)], self._filling

    def add_tokens(
        self,
        codes: Codes,
        positive: npt.NDArray[np.bool_],
        lengths: Codes,
        sums: GroupSums,
        log_ratios: Floats,
        weights: Values,
    ) -> None:
        """Add what `weigh` found of samples [n] of too many sources for slots; their tokens' bins are sorted."""
        distinct = np.unique(codes)
        self._counts[distinct] += sums.counts
        self._sums[distinct] += sums.sums
        kept = np.repeat(positive, lengths)
        places = np.repeat(codes << BIN_BITS, lengths)[kept]
        for quantity, values in (("log_ratio", log_ratios), ("weight", weights)):
            bins = bins_of(values.astype(np.float32, copy=False))[kept]
            self._wait(quantity, *np.unique(places | bins, return_counts=True))

    def add_samples(self, codes: Codes, lengths: Codes, found: SampleSums) -> None:
        """Add what `weigh` found of samples [n]."""
        count = len(self._sources)
        weight = found.sums[:, kernels.WEIGHT]
        mean = weight / lengths
        ratio = np.clip(found.sums[:, kernels.LOG_RATIO_SUM], -EXP_BOUND, EXP_BOUND)
        self._samples += np.bincount(codes, minlength=count)
        self._mean += np.bincount(codes, mean, count)
        self._mean_square += np.bincount(codes, mean**2, count)
        self._ratio_square += np.bincount(codes, np.exp(2 * ratio), count)
        for row, (least, greatest) in enumerate(
            ((kernels.LOG_RATIO_MIN, kernels.LOG_RATIO_MAX), (kernels.WEIGHT_MIN, kernels.WEIGHT_MAX))
        ):
            np.minimum.at(self._minimum[row], codes, found.sums[:, least])
            np.maximum.at(self._maximum[row], codes, found.sums[:, greatest])
        keys = codes << BIN_BITS | bins_of(weight.astype(np.float32))
        self._wait("sample_weight", *np.unique(keys, return_counts=True))

    def take_ratios(self, other: SourceTotals) -> None:
        """Take what another weighting of the same log-ratios has measured of them; both have seen all samples."""
        self._keep()
        other._keep()
        self._counts[:, kernels.COUNTS_OF_RATIOS] = other._counts[:, kernels.COUNTS_OF_RATIOS]
        self._sums[:, kernels.OF_RATIOS] = other._sums[:, kernels.OF_RATIOS]
        self._kept["log_ratio"] = other._kept["log_ratio"]

    def table(self) -> pa.Table:
        """One row per source (schema: `pear_data.schema.WEIGHT_TOTALS`)."""
        self._keep()
        if not self._has_behavior:
            self._sums[:, (kernels.BEHAVIOR, kernels.LOG_RATIO_SQUARE)] = np.nan
            self._minimum[0], self._maximum[0] = np.inf, -np.inf
            self._ratio_square[:] = np.nan
            self._kept["log_ratio"] = []
        columns = {
            "source": self._sources,
            "samples": self._samples,
            "negatives": self._negatives,
            **self._statuses,
            "sample_mean_sum": self._mean,
            "sample_mean_square_sum": self._mean_square,
            "sample_ratio_square_sum": self._ratio_square,
            "log_ratio_min": self._minimum[0],
            "log_ratio_max": self._maximum[0],
            "weight_min": self._minimum[1],
            "weight_max": self._maximum[1],
            "tokens": self._counts[:, kernels.TOKENS],
            "clipped_low": self._counts[:, kernels.CLIPPED_LOW],
            "clipped_high": self._counts[:, kernels.CLIPPED_HIGH],
            "saturated_low": self._counts[:, kernels.SATURATED_LOW],
            "saturated_high": self._counts[:, kernels.SATURATED_HIGH],
            "weight_sum": self._sums[:, kernels.WEIGHT],
            "weight_square_sum": self._sums[:, kernels.WEIGHT_SQUARE],
            "target_logprob_sum": self._sums[:, kernels.TARGET],
            "behavior_logprob_sum": self._sums[:, kernels.BEHAVIOR],
            "log_ratio_square_sum": self._sums[:, kernels.LOG_RATIO_SQUARE],
        }
        arrays = {name: _column(values, WEIGHT_TOTALS.field(name).type) for name, values in columns.items()}
        for quantity, kept in self._kept.items():
            arrays |= self._histogram_columns(quantity, *_merged(kept))
        return pa.table([arrays[name] for name in WEIGHT_TOTALS.names], schema=WEIGHT_TOTALS)

    def _wait(self, quantity: str, keys: Codes, counts: Codes) -> None:
        kept = self._kept[quantity]
        kept.append((keys, counts))
        if len(kept) > WAITING:
            self._kept[quantity] = [_merged(kept)]

    def _histogram_columns(self, quantity: str, keys: Codes, counts: Codes) -> dict[str, pa.Array]:
        used = np.bincount(keys >> BIN_BITS, minlength=len(self._sources))
        bins, numbers = f"{quantity}_bins", f"{quantity}_counts"
        return {
            bins: list_column(
                (keys & (1 << BIN_BITS) - 1).astype(np.int32), used, WEIGHT_TOTALS.field(bins).type
            ),
            numbers: list_column(counts, used, WEIGHT_TOTALS.field(numbers).type),
        }

    def _keep(self) -> None:
        """Move what the slots hold to where it takes no more room than it needs."""
        held, filling = self._held, self._filling
        self._counts[held] += filling.counts[: len(held)]
        self._sums[held] += filling.sums[: len(held)]
        for quantity, histograms in (("log_ratio", filling.log_ratios), ("weight", filling.weights)):
            slots, bins, counts = kernels.drain(histograms[: len(held)])
            keys = held[slots] << BIN_BITS | bins
            order = np.argsort(keys, kind="stable")
            self._wait(quantity, keys[order], counts[order])
        filling.counts[: len(held)] = 0
        filling.sums[: len(held)] = 0
        self._held = np.empty(0, np.int64)


def _merged(parts: list[tuple[Codes, Codes]]) -> tuple[Codes, Codes]:
    """Keys, ascending, each once, with the sum of its counts; a single part is so already."""
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if len(parts) == 1:
        return parts[0]
    keys, place = np.unique(np.concatenate([key for key, _ in parts]), return_inverse=True)
    counts = np.bincount(place, np.concatenate([count for _, count in parts]), len(keys))
    return keys, counts.astype(np.int64)


def _column(values: list[str] | npt.NDArray[np.generic], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values).cast(kind)
    rows = np.asarray(values)
    return list_column(rows.reshape(-1), np.full(len(rows), rows.shape[1]), kind)
