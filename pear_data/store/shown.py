"""Which of a store's weightings the views show, and which one is meant where none is named."""

from __future__ import annotations

from pear_data.config import BEHAVIOR, INITIAL
from pear_data.store.manifest import Manifest

PREFERRED_WEIGHTING = "block"


def shown_weightings(manifest: Manifest) -> list[str]:
    """Names of the weightings whose shards have summaries and totals, in the order they were made."""
    return [name for name in manifest.names("weights") if _is_shown(manifest, name)]


def left_out(manifest: Manifest) -> list[str]:
    """Names of the weightings that an earlier version made, without summaries."""
    return [name for name in manifest.names("weights") if not _is_shown(manifest, name)]


def default_weighting(manifest: Manifest) -> str | None:
    """The weighting behind the columns that name none: "block" if there is one, else the first made."""
    names = shown_weightings(manifest)
    return PREFERRED_WEIGHTING if PREFERRED_WEIGHTING in names else next(iter(names), None)


def compared_policies(manifest: Manifest) -> tuple[str, str]:
    """(target, behavior) of the default weighting, or the policies a weighting takes by default."""
    name = default_weighting(manifest)
    settings = manifest.stages[f"weights/{name}"].settings if name else {}
    return settings.get("target", INITIAL), settings.get("behavior", BEHAVIOR)


def _is_shown(manifest: Manifest, name: str) -> bool:
    return all(shard.summary and shard.totals for shard in manifest.stages[f"weights/{name}"].shards)
