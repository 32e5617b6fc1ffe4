"""What an export says for live weights, and the weightings that these cannot equal."""

from __future__ import annotations

from typing import Any

from pear_data.config import BEHAVIOR, ExportSettings, WeightSettings
from pear_data.errors import UsageError
from pear_data.stages.export.manifest import LiveSettings
from pear_data.store import Store

_SETTINGS = ("block_size", "gamma", "clip_log_ratio", "clip_log_weight", "negative_scale")


def behavior_policy(store: Store, settings: ExportSettings) -> str | None:
    """The policy whose log-probs go along, or None without --live: the one asked for, else the weighting's own."""
    if not settings.live:
        return None
    if settings.behavior:
        return settings.behavior
    weighting = store.stage(f"weights/{settings.weights}").settings
    unread = (
        weighting["level"] == "uniform" and f"scores/{weighting['behavior']}" not in store.manifest.stages
    )
    return BEHAVIOR if unread else str(weighting["behavior"])


def live_settings(store: Store, weights: str, behavior: str) -> LiveSettings:
    """The settings of the weighting `weights` as the training hook takes them.

    A weighting of level uniform stands for no level: then they are those that `pear-data weight` has by default.

    Raises:
        UsageError: the weighting rests on more than a sequence's own log-ratios in blocks of one size, or on another
            policy's.
    """
    weighting = store.stage(f"weights/{weights}").settings
    if found := _beyond_live(weighting, store.stage(f"scores/{behavior}").settings, behavior):
        raise UsageError(
            f"--live cannot go with weights/{weights}: live weights know no {' and no '.join(found)}. "
            "Export it without --live, or make a weighting without that and export it"
        )
    baseline = weighting["level"] == "uniform"
    default = {name: WeightSettings.model_fields[name].default for name in ("level", *_SETTINGS)}
    chosen = {name: weighting.get(name, default[name]) for name in _SETTINGS}
    return LiveSettings(
        behavior=behavior, level=default["level"] if baseline else weighting["level"], **chosen
    )


def _beyond_live(weighting: dict[str, Any], scores: dict[str, Any], behavior: str) -> list[str]:
    of_baseline = weighting["level"] == "uniform"
    cannot = {
        "level dft": weighting["level"] == "dft",
        f"log-ratios to {weighting['behavior']} beside those to {behavior}": not of_baseline
        and weighting["behavior"] != behavior,
        "blocks of text (--block-by)": weighting.get("block_by", "tokens") != "tokens",
        "centered log-ratios (--center)": weighting["center"] != "none",
        "normalised weights (--normalize)": weighting["normalize"] != "none",
        "settings of single sources (--per-source)": bool(weighting["per_source"]),
        "log-probs of another tokenizer (--align bytes)": scores.get("align") == "bytes",
    }
    return [what for what, is_so in cannot.items() if is_so]
