"""The report's charts of one weighting."""

from __future__ import annotations

import numpy as np

from pear_data.config import BASELINES, WeightSettings
from pear_data.stages.axes import percent
from pear_data.stages.charts import Chart, KindOf, log_ratio_chart, weight_chart
from pear_data.stages.colours import STEPS, WeightScale
from pear_data.stages.measure import Totals
from pear_data.stages.position_charts import position_charts
from pear_data.stages.statistics import GroupStatistics, WeightingStatistics


def charts_of(
    totals: Totals, numbers: WeightingStatistics, corpus_mean: float | None, scale: WeightScale
) -> list[Chart]:
    """Distributions of weights and log-ratios, then what changes with position.

    Args:
        totals: of the whole corpus, with at least one scored token.
        numbers: the diagnostics of the same.
        corpus_mean: the mean log-ratio that was subtracted, where one was.
        scale: the colours of the weights.
    """
    kind_of = _kind_of(scale)
    charts = [weight_chart(totals.weights, kind_of)]
    clips = _clips(numbers.settings, corpus_mean)
    if totals.log_ratios.total:
        charts.append(log_ratio_chart(totals.log_ratios, clips, _clipped(numbers.corpus, numbers.settings)))
    return charts + position_charts(
        numbers.corpus.by_decile, kind_of, has_clips=numbers.settings.level not in BASELINES
    )


def _kind_of(scale: WeightScale) -> KindOf:
    return lambda weights: [
        f"step{step + STEPS}" for step in scale.steps(weights.astype(np.float32)).tolist()
    ]


def _clips(settings: WeightSettings, corpus_mean: float | None) -> tuple[float, float] | None:
    """Where the clips fall among log-ratios that are not centered; None where that differs from sample to sample."""
    if settings.level in BASELINES or settings.center == "sample":
        return None
    low, high = settings.clip_log_ratio
    return low + (corpus_mean or 0.0), high + (corpus_mean or 0.0)


def _clipped(corpus: GroupStatistics, settings: WeightSettings) -> str:
    if settings.level in BASELINES:
        return f"They do not enter {settings.level} weights."
    text = (
        f"{percent(corpus.log_ratio_clipped_low)} were below the lower clip,"
        f" {percent(corpus.log_ratio_clipped_high)} above the upper one."
    )
    if settings.center == "sample":
        text += " Each sample's mean is subtracted before the clip, so that it has no one place here."
    if settings.center == "corpus":
        text += " The mean of the corpus is subtracted before the clip, which is marked where it falls here."
    own = sum(source.clip_log_ratio is not None for source in settings.per_source.values())
    return text + (f" {own} sources have clips of their own, not marked here." if own else "")
