"""Which samples a report shows, and their tokens with a colour class and a tooltip each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pear_data.config import WeightSettings
from pear_data.stages.clip_marks import HIGH, KEPT, LOW, clip_marks
from pear_data.stages.colours import STEPS, WeightScale
from pear_data.stages.measure import Measured
from pear_data.stages.page_text import shortened
from pear_data.stages.sample_tokens import SampleTokens, read_sample
from pear_data.stages.text import one_line, printable
from pear_data.store.sql_text import quoted
from pear_data.store.views import Views

# Scored tokens shown of a sample, half of them before a gap and half after; no one looks at a picture of more.
SHOWN_TOKENS = 500
# The same for each run of tokens that are not scored, which are there for orientation.
SHOWN_CONTEXT = 80
# Characters shown of a token; those of real vocabularies are shorter.
SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text with one style: a scored token (`step` of the colour scale) or text that is not scored."""

    text: str
    step: int | None
    title: str


@dataclass(frozen=True, slots=True)
class Card:
    """One sample of the heat map. `left_out` counts its scored tokens that are not shown."""

    why: str
    sample: SampleTokens
    pieces: list[Piece]
    left_out: int


_MARKS = {LOW: " (below the clip)", KEPT: "", HIGH: " (above the clip)"}
# What makes a sample telling: why, and how it is picked from `telling`.
_PICKS = (
    ("Greatest mean weight", "arg_max(sample_id, (mean, sample_id))", "max(mean) > min(mean)"),
    ("Least mean weight", "arg_min(sample_id, (mean, sample_id))", "max(mean) > min(mean)"),
    ("Median mean weight", "quantile_disc((mean, sample_id), 0.5)[2]", "true"),
    ("Lowest ESS", "arg_min(sample_id, (evenness, sample_id))", "min(evenness) < 0.999"),
    ("Highest ESS", "arg_max(sample_id, (evenness, sample_id))", "max(evenness) - min(evenness) > 0.001"),
    ("Largest single weight", "arg_max(sample_id, (largest, sample_id))", "max(largest) > min(largest)"),
    ("Least likely under the target", "arg_min(sample_id, (log_ratio, sample_id))", "max(log_ratio) > min(log_ratio)"),
    ("Likeliest under the target", "arg_max(sample_id, (log_ratio, sample_id))", "max(log_ratio) > min(log_ratio)"),
)  # fmt: skip


def cards(views: Views, measured: Measured, scale: WeightScale, corpus_mean: float | None) -> list[Card]:
    """A few telling samples of a weighting: its extremes and what lies between them.

    Args:
        views: the store's.
        measured: which weighting.
        scale: the colours of its weights.
        corpus_mean: as in `clip_marks`.
    """
    picked: dict[str, str] = {}
    for sample_id, why in _telling(views, measured.name):
        picked[sample_id] = f"{picked[sample_id]}, {why.lower()}" if sample_id in picked else why
    return [
        _card(why, read_sample(views, sample_id, measured.settings), measured.settings, scale, corpus_mean)
        for sample_id, why in picked.items()
    ]


def _telling(views: Views, name: str) -> list[tuple[str, str]]:
    """(sample_id, why) of the samples at the extremes of the summary columns."""
    mean, ess, largest, log_ratio_sum, status = (
        quoted(f"{column}_{name}")
        for column in ("weight_mean", "ess", "weight_max", "log_ratio_sum", "weight_status")
    )
    picks = ", ".join(f"CASE WHEN {condition} THEN {pick} END" for _, pick, condition in _PICKS)
    # Not among the shortest samples: a weight or two make no picture.
    (chosen,) = views.rows(
        f"""
        WITH weighted AS (
            SELECT sample_id, num_scored, {mean} AS mean, {ess} / num_scored AS evenness, {largest} AS largest,
                {log_ratio_sum} / num_scored AS log_ratio
            FROM samples WHERE {status} = 'ok' AND label > 0
        ), telling AS (
            SELECT * FROM weighted WHERE num_scored >= (SELECT median(num_scored) / 2 FROM weighted)
        )
        SELECT {picks} FROM telling"""
    )
    return [
        (sample_id, why)
        for sample_id, (why, _, _) in zip(chosen, _PICKS, strict=True)
        if sample_id is not None
    ]


def _card(
    why: str, sample: SampleTokens, settings: WeightSettings, scale: WeightScale, corpus_mean: float | None
) -> Card:
    scored = int(sample.loss_mask.sum())
    titles = _titles(sample, settings, corpus_mean)
    pieces, left_out = _bounded(_pieces(sample, titles, scale), max(0, scored - SHOWN_TOKENS))
    return Card(why, sample, pieces, left_out)


def _titles(sample: SampleTokens, settings: WeightSettings, corpus_mean: float | None) -> list[str]:
    """The numbers of each scored token."""
    assert sample.weights is not None
    weights = [f"weight {weight:.4g}" for weight in sample.weights.tolist()]
    if sample.log_ratios is None:
        return weights
    marks = clip_marks(sample, settings, corpus_mean).tolist()
    return [
        f"{weight}, log-ratio {log_ratio:+.3f}{_MARKS[mark]}"
        for weight, log_ratio, mark in zip(weights, sample.log_ratios.tolist(), marks, strict=True)
    ]


def _pieces(sample: SampleTokens, titles: Sequence[str], scale: WeightScale) -> list[Piece]:
    """One piece for each token."""
    assert sample.weights is not None
    scored = zip((scale.steps(sample.weights) + STEPS).tolist(), titles, strict=True)
    pieces = []
    for token, is_scored in zip(sample.tokens, sample.loss_mask.tolist(), strict=True):
        text = shortened(printable(token), SHOWN_CHARACTERS)
        if is_scored:
            step, title = next(scored)
            pieces.append(Piece(text.replace("\n", "⏎\n"), step, f"{one_line(text)}  {title}"))
        else:
            pieces.append(Piece(text, None, ""))
    return pieces


def _bounded(pieces: Sequence[Piece], too_many: int) -> tuple[list[Piece], int]:
    """The pieces to show, and how many scored tokens are not among them: `too_many` in the middle."""
    shown: list[Piece] = []
    seen = 0
    half = SHOWN_TOKENS // 2
    for is_scored, group in itertools.groupby(pieces, key=lambda piece: piece.step is not None):
        run = list(group)
        in_gap = half <= seen < half + too_many
        if not is_scored and not in_gap:
            shown.append(_context(run))
        for piece in run if is_scored else ():
            if not too_many or seen < half or seen >= half + too_many:
                shown.append(piece)
            elif seen == half:
                shown.append(Piece(f" … {too_many:,} scored tokens left out … ", None, ""))
            seen += 1
    return shown, too_many


def _context(run: Sequence[Piece]) -> Piece:
    """Text that is not scored as one piece, its middle left out where it is long."""
    texts = [piece.text for piece in run]
    half = SHOWN_CONTEXT // 2
    left_out = len(texts) - 2 * half
    if left_out > half:  # fewer are shown in less room than the words take
        texts = [*texts[:half], f" … {left_out:,} tokens left out … ", *texts[-half:]]
    return Piece("".join(texts), None, "")
