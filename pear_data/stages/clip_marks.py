"""Which log-ratios of a sample a weighting's clips met."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pear_data.config import BASELINES, WeightSettings
from pear_data.stages.sample_tokens import SampleTokens
from pear_data.store import Store

LOW, KEPT, HIGH = -1, 0, 1


def clips_of(settings: WeightSettings, source: str) -> tuple[float, float]:
    """The log-ratio clips that a source is weighted with."""
    own = settings.per_source.get(source)
    return settings.clip_log_ratio if own is None or own.clip_log_ratio is None else own.clip_log_ratio


def corpus_mean(store: Store, name: str) -> float | None:
    """The mean log-ratio that a weighting subtracts from every log-ratio; None where it is centered otherwise."""
    return store.stage(f"weights/{name}").decisions.get("center")


def clip_marks(
    sample: SampleTokens, settings: WeightSettings, corpus_mean: float | None
) -> npt.NDArray[np.int8]:
    """LOW, KEPT or HIGH for each log-ratio [T] of a sample that has them; a baseline clips none.

    Args:
        sample: with log-ratios.
        settings: the weighting's.
        corpus_mean: the weighting's, see `corpus_mean`.
    """
    assert sample.log_ratios is not None
    if settings.level in BASELINES:
        return np.full(len(sample.log_ratios), KEPT, dtype=np.int8)
    center = {"none": 0.0, "sample": float(sample.log_ratios.mean()), "corpus": corpus_mean or 0.0}
    low, high = clips_of(settings, sample.source)
    centered = sample.log_ratios - center[settings.center]
    return (centered > high).astype(np.int8) - (centered < low).astype(np.int8)
