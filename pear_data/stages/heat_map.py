"""Which samples a report shows, and their tokens with a colour class and a tooltip each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from pear_data.stages.colours import STEPS, WeightScale
from pear_data.stages.measure import Measured
from pear_data.stages.sample_tokens import SampleTokens, read_sample
from pear_data.stages.text import one_line, printable
from pear_data.store.view_sql import quoted
from pear_data.store.views import Views

# Tokens shown of a sample, half of them before a gap and half after; no one looks at a picture of more.
SHOWN_TOKENS = 700


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text with one style: a scored token (`step` of the colour scale) or text that is not scored."""

    text: str
    step: int | None
    title: str


@dataclass(frozen=True, slots=True)
class Card:
    """One sample of the heat map."""

    why: str
    sample: SampleTokens
    pieces: list[Piece]


def cards(views: Views, measured: Measured, scale: WeightScale) -> list[Card]:
    """A few telling samples of a weighting: its extremes and what lies between them."""
    picked: dict[str, str] = {}
    for sample_id, why in _telling(views, measured.name):
        picked[sample_id] = f"{picked[sample_id]}, {why.lower()}" if sample_id in picked else why
    return [
        _card(why, read_sample(views, sample_id, measured.settings), scale)
        for sample_id, why in picked.items()
    ]


def _telling(views: Views, name: str) -> list[tuple[str, str]]:
    """(sample_id, why) of the samples with the least, the median and the greatest mean weight, and the least even."""
    mean, ess, status = (quoted(f"{column}_{name}") for column in ("weight_mean", "ess", "weight_status"))
    # Not among the shortest samples: a weight or two make no picture.
    ranked = f"""
        WITH weighted AS (
            SELECT sample_id, {mean} AS mean, {ess} / num_scored AS evenness, num_scored
            FROM samples WHERE {status} = 'ok' AND label > 0
        ), telling AS (
            SELECT * FROM weighted
            WHERE num_scored >= (SELECT median(num_scored) / 2 FROM weighted)
        ), ranked AS (
            SELECT sample_id, evenness,
                row_number() OVER (ORDER BY mean, sample_id) AS place,
                count(*) OVER () AS places,
                row_number() OVER (ORDER BY evenness, sample_id) AS unevenness
            FROM telling
        )"""
    picks = (
        ("Greatest mean weight", "place = places"),
        ("Median mean weight", "place = (places + 1) // 2"),
        ("Least mean weight", "place = 1"),
        ("Least even weights", "unevenness = 1 AND evenness < 0.999"),
    )
    found = [
        (views.rows(f"{ranked} SELECT sample_id FROM ranked WHERE {condition}"), why)
        for why, condition in picks
    ]
    return [(rows[0][0], why) for rows, why in found if rows]


def _card(why: str, sample: SampleTokens, scale: WeightScale) -> Card:
    pieces = _pieces(sample, scale)
    left_out = max(0, len(pieces) - SHOWN_TOKENS)
    if left_out:
        half = SHOWN_TOKENS // 2
        gap = Piece(f" … {left_out:,} tokens left out … ", None, "")
        pieces = [*pieces[:half], gap, *pieces[-half:]]
    return Card(why, sample, _joined(pieces))


def _pieces(sample: SampleTokens, scale: WeightScale) -> list[Piece]:
    """One piece for each token."""
    assert sample.weights is not None
    assert sample.log_ratios is not None
    scored = zip(
        scale.steps(sample.weights).tolist(), sample.weights.tolist(), sample.log_ratios.tolist(), strict=True
    )
    pieces = []
    for token, is_scored in zip(sample.tokens, sample.loss_mask.tolist(), strict=True):
        text = printable(token)
        if is_scored:
            step, weight, log_ratio = next(scored)
            title = f"{one_line(token)}  weight {weight:.4g}, log-ratio {log_ratio:+.3f}"
            pieces.append(Piece(text.replace("\n", "⏎\n"), step + STEPS, title))
        else:
            pieces.append(Piece(text, None, ""))
    return pieces


def _joined(pieces: list[Piece]) -> list[Piece]:
    """The same with neighbouring text that is not scored made one piece."""
    return [
        piece
        for step, run in itertools.groupby(pieces, key=lambda piece: piece.step)
        for piece in (run if step is not None else [Piece("".join(part.text for part in run), None, "")])
    ]
