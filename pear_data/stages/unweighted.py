"""Why a sample has no weights, in words."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_data.config import BASELINES, WeightSettings
from pear_data.schema import (
    STATUS_BAD_FIELD,
    STATUS_DROPPED,
    STATUS_FAILED,
    STATUS_NONFINITE,
    STATUS_OK,
    STATUS_TOO_LONG,
    STATUS_UNALIGNED,
    STATUS_UNSCORED,
)
from pear_data.store import Store
from pear_data.store.views import Views

_MEANING = {
    STATUS_TOO_LONG: "longer than the policy's model or --max-length takes",
    STATUS_NONFINITE: "log-probs that are not finite",
    STATUS_BAD_FIELD: "the recorded log-probs are not one for each scored token, finite and at most 0",
    STATUS_FAILED: "the engine fails on it",
    STATUS_UNALIGNED: "the two policies read different texts",
}


def why_unweighted(
    store: Store, views: Views, sample_id: str, status: str, settings: WeightSettings
) -> str | None:
    """What the status of a sample's weights comes from, or None where nothing more is known."""
    if status == STATUS_DROPPED:
        return "it is a negative, and --negative-scale was 0"
    if status != STATUS_UNSCORED:
        return None
    return "; ".join(_faults(store, views, sample_id, settings)) or None


def _faults(store: Store, views: Views, sample_id: str, settings: WeightSettings) -> Iterator[str]:
    statuses = dict(views.rows("SELECT policy, status FROM scores WHERE sample_id = ?", [sample_id]))
    known = store.manifest.names("scores")
    for policy in (settings.target, settings.behavior):
        if policy not in known and settings.level in BASELINES:
            continue
        status = statuses.get(policy, "not scored yet")
        if status != STATUS_OK:
            reason = _quarantined_reason(store, policy, sample_id) or _MEANING.get(status)
            yield f"{policy}: {status}" + (f" ({reason})" if reason else "")


def _quarantined_reason(store: Store, policy: str, sample_id: str) -> str | None:
    """The reason a policy's quarantine holds for a sample. Only shards with a quarantine are looked at.

    Raises:
        MismatchError: a file differs from the manifest.
    """
    for shard in (
        store.stage(f"scores/{policy}").shards if f"scores/{policy}" in store.manifest.stages else ()
    ):
        if shard.quarantine is None:
            continue
        ids = pq.read_table(store.file(shard.file), columns=["sample_id"])["sample_id"]
        row = pc.index(ids, sample_id).as_py()
        if row >= 0:
            held = pq.read_table(store.file(shard.quarantine), columns=["row", "reason"])
            reasons = dict(zip(held["row"].to_pylist(), held["reason"].to_pylist(), strict=True))
            return reasons.get(row)
    return None
