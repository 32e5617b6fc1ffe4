"""One self-contained HTML page about a store's weights: a verdict, charts, and samples with their tokens coloured.

The page holds no script and loads nothing; a content security policy forbids both. Everything that comes from the
corpus is escaped by the template engine, freed of control characters and shortened where it is long. No token is read
but those of the samples shown.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pear_data import __version__
from pear_data.config import ReportSettings
from pear_data.errors import UsageError
from pear_data.progress import Outcome
from pear_data.stages.charts import Chart
from pear_data.stages.clip_marks import corpus_mean
from pear_data.stages.colours import STEPS, WeightScale, scale_for
from pear_data.stages.heat_map import Card, cards
from pear_data.stages.measure import Measured, measure
from pear_data.stages.page_text import NAME_CHARACTERS, shortened
from pear_data.stages.side_by_side import Comparison, clipped, compare_sources, compare_weightings
from pear_data.stages.statistics import WeightingStatistics, summarise
from pear_data.stages.statistics_text import ROWS, described, set_aside
from pear_data.stages.text import one_line
from pear_data.stages.verdict import advice
from pear_data.stages.weighting_charts import charts_of
from pear_data.store import Store
from pear_data.store.commit import write_atomically
from pear_data.store.shown import default_weighting
from pear_data.store.views import Views, connect

# Weightings shown with charts and samples; the others are compared only.
SHOWN_WEIGHTINGS = 6
# Characters of a sentence.
TEXT_CHARACTERS = 1500


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
    sources: Comparison | None
    legend: list[tuple[int, str]]
    cards: list[Card]


def report(store: Store, settings: ReportSettings) -> Outcome:
    """Write the page to `settings.out`, whole or not at all.

    Raises:
        UsageError: there is no such weighting, or none at all, or it is not finished.
        MismatchError: an artefact differs from its manifest.
        PearError: the disk refused.
    """
    names = [settings.weights] if settings.weights else store.manifest.begun("weights")
    if not names:
        raise UsageError(f"{store.path} has no weights yet: make some with `pear-data weight`")
    page = render(store, names)
    write_atomically(Path(settings.out), page)
    return Outcome(
        f"{settings.out}: {', '.join(names)} in {len(page.encode()) / 1e3:,.0f} kB; open it in a browser"
    )


def render(store: Store, names: Sequence[str]) -> str:
    """The page about the named weightings, the default one first where it is among them."""
    preferred = default_weighting(store.manifest)
    names = sorted(names, key=lambda name: name != preferred)
    measured = [measure(store, name) for name in names]
    found = [summarise(store, one) for one in measured]
    shown = list(zip(measured, found, strict=True))[:SHOWN_WEIGHTINGS]
    with connect(store) as views:
        sections = [_section(store, views, one, numbers) for one, numbers in shown]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            version=__version__,
            store=store.path.absolute().name,
            first=found[0],
            first_clipped=clipped(found[0].settings, found[0].corpus),
            policies=_policies(store, found[0]),
            sections=sections,
            sections_left_out=[one.weights for one in found[SHOWN_WEIGHTINGS:]],
            found=found,
            weightings=compare_weightings(found),
            rows=ROWS,
            advice=advice(found, store.manifest.names("weights")),
        )
    )


def _section(
    store: Store, views: Views, measured: Measured, numbers: WeightingStatistics
) -> WeightingSection:
    corpus = numbers.corpus
    scale = _scale(numbers)
    mean = corpus_mean(store, measured.name)
    return WeightingSection(
        statistics=numbers,
        description=described(numbers.settings),
        aside=set_aside(corpus),
        charts=charts_of(measured.whole(), numbers, mean, scale) if corpus.scored_tokens else [],
        sources=compare_sources(numbers.settings, corpus, numbers.sources)
        if len(numbers.sources) > 1
        else None,
        legend=[(step + STEPS, scale.label(step)) for step in range(-STEPS, STEPS + 1)],
        cards=cards(views, measured, scale, mean),
    )


def _scale(numbers: WeightingStatistics) -> WeightScale:
    """The colours of a weighting, wide enough for all but its most extreme weights."""
    corpus = numbers.corpus
    return scale_for(corpus.weight_p1 or 1.0, corpus.weight_p99 or 1.0)


def _policies(store: Store, numbers: WeightingStatistics) -> list[PolicyFacts]:
    settings, corpus = numbers.settings, numbers.corpus
    sides = (
        ("target", settings.target, corpus.ppl_target),
        ("behavior", settings.behavior, corpus.ppl_behavior),
    )
    stages = store.manifest.stages
    return [
        PolicyFacts(role, name, _facts(stages[f"scores/{name}"].settings), perplexity)
        for role, name, perplexity in sides
        if f"scores/{name}" in stages  # a baseline does without a behavior policy
    ]


def _facts(settings: dict[str, Any]) -> str:
    """Where a policy's log-probs come from, in a few words."""
    if settings.get("from_field"):
        return f"log-probs recorded in the corpus, field {settings['from_field']}"
    parts = [settings.get("model"), settings.get("engine"), settings.get("dtype")]
    return ", ".join(str(part) for part in parts if part)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pear_data.stages", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "name": lambda text: shortened(one_line(text), NAME_CHARACTERS),
        "sentence": _sentence,
        "percent": functools.partial(_formatted, "{:.3g} %", 100),
        "number": functools.partial(_formatted, "{:.3g}", 1),
        "whole": functools.partial(_formatted, "{:,.0f}", 1),
    }
    return environment


def _sentence(text: str) -> Markup:
    """A sentence, what stands between backticks as code."""
    safe = str(escape(shortened(one_line(text), TEXT_CHARACTERS)))
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", safe))


def _formatted(form: str, factor: float, value: float | None) -> str:
    return "-" if value is None else form.format(factor * value)
