"""One self-contained HTML page about a store's weights: numbers, charts, and samples with their tokens coloured.

The page holds no script and loads nothing; a content security policy forbids both. Everything that comes from the
corpus is escaped by the template engine and freed of control characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

from pear_data import __version__
from pear_data.config import ReportSettings
from pear_data.errors import UsageError
from pear_data.progress import Outcome
from pear_data.stages.charts import Chart, log_ratio_chart, log_weight_chart, position_chart
from pear_data.stages.colours import STEPS, WeightScale, scale_for
from pear_data.stages.heat_map import Card, cards
from pear_data.stages.measure import Measured, measure
from pear_data.stages.statistics import WeightingStatistics, summarise
from pear_data.stages.statistics_text import ROWS, SOURCE_COLUMNS, described, set_aside
from pear_data.stages.text import one_line
from pear_data.store import Store
from pear_data.store.commit import write_atomically
from pear_data.store.view_sql import default_weighting
from pear_data.store.views import connect


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """What the page says of a policy."""

    role: str
    name: str
    facts: str
    perplexity: float | None


@dataclass(frozen=True, slots=True)
class WeightingSection:
    """What the page shows of one weighting."""

    statistics: WeightingStatistics
    description: str
    aside: str | None
    charts: list[Chart]
    legend: list[tuple[int, str]]
    cards: list[Card]
    is_open: bool


def report(store: Store, settings: ReportSettings) -> Outcome:
    """Write the page to `settings.out`, whole or not at all.

    Raises:
        UsageError: there is no such weighting, or none at all, or it is not finished.
        MismatchError: an artefact differs from its manifest.
        PearError: the disk refused.
    """
    names = [settings.weights] if settings.weights else store.manifest.names("weights")
    if not names:
        raise UsageError(f"{store.path} has no weights yet: make some with `pear-data weight`")
    page = render(store, names)
    write_atomically(Path(settings.out), page)
    return Outcome(
        f"{settings.out}: {', '.join(names)} in {len(page.encode()) / 1e3:,.0f} kB; open it in a browser"
    )


def render(store: Store, names: Sequence[str]) -> str:
    """The page about the named weightings."""
    measured = [measure(store, name) for name in names]
    found = [summarise(store, one) for one in measured]
    preferred = default_weighting(store.manifest)
    shown_open = preferred if preferred in names else names[0]
    with connect(store) as views:
        sections = [
            _section(one, numbers, cards(views, one, _scale(numbers)), one.name == shown_open)
            for one, numbers in zip(measured, found, strict=True)
        ]
    sections.sort(key=lambda section: not section.is_open)
    first = next(section.statistics for section in sections)
    ratios = next(one for one in measured if one.name == first.weights)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            version=__version__,
            store=store.path.absolute().name,
            first=first,
            policies=_policies(store, first),
            sections=sections,
            found=found,
            rows=ROWS,
            source_columns=SOURCE_COLUMNS,
            log_ratio_chart=_log_ratio_chart(ratios),
            findings=_findings(found),
        )
    )


def _section(
    measured: Measured, numbers: WeightingStatistics, chosen: list[Card], is_open: bool
) -> WeightingSection:
    scale = _scale(numbers)
    charts = []
    if numbers.corpus.scored_tokens:
        kind_of = _kind_of(scale)
        weights = measured.whole().weights
        charts = [
            log_weight_chart(weights, kind_of),
            position_chart(numbers.corpus.weight_by_decile, kind_of),
        ]
    return WeightingSection(
        statistics=numbers,
        description=described(numbers.settings),
        aside=set_aside(numbers.corpus),
        charts=charts,
        legend=[(step + STEPS, scale.label(step)) for step in range(-STEPS, STEPS + 1)],
        cards=chosen,
        is_open=is_open,
    )


def _scale(numbers: WeightingStatistics) -> WeightScale:
    """The colours of a weighting, wide enough for all but its most extreme weights."""
    corpus = numbers.corpus
    return scale_for(corpus.weight_p1 or 1.0, corpus.weight_p99 or 1.0)


def _kind_of(scale: WeightScale) -> Callable[[npt.NDArray[np.float64]], list[str]]:
    return lambda weights: [
        f"step{step + STEPS}" for step in scale.steps(weights.astype(np.float32)).tolist()
    ]


def _log_ratio_chart(measured: Measured) -> Chart | None:
    log_ratios = measured.whole().log_ratios
    return log_ratio_chart(log_ratios, measured.settings.clip_log_ratio) if log_ratios.total else None


def _policies(store: Store, numbers: WeightingStatistics) -> list[PolicyFacts]:
    settings, corpus = numbers.settings, numbers.corpus
    sides = (
        ("target", settings.target, corpus.ppl_target),
        ("behavior", settings.behavior, corpus.ppl_behavior),
    )
    return [
        PolicyFacts(role, name, _facts(store.stage(f"scores/{name}").settings), perplexity)
        for role, name, perplexity in sides
    ]


def _facts(settings: dict[str, Any]) -> str:
    """Where a policy's log-probs come from, in a few words."""
    if settings.get("from_field"):
        return f"log-probs recorded in the corpus, field {one_line(str(settings['from_field']))}"
    parts = [settings.get("model"), settings.get("engine"), settings.get("dtype")]
    return ", ".join(one_line(str(part)) for part in parts if part)


def _findings(found: Sequence[WeightingStatistics]) -> list[tuple[str, list[str]]]:
    """(what looks wrong, weightings it is true of); the same sentence is said once."""
    texts: dict[str, list[str]] = {}
    for one in found:
        for finding in one.findings:
            texts.setdefault(finding.text, []).append(one.weights)
    return list(texts.items())


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pear_data.stages", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["one_line"] = one_line
    return environment
