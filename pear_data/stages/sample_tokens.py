"""One sample with its tokens, log-ratios and weights, read through the store's views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pear_data.config import WeightSettings
from pear_data.errors import UsageError
from pear_data.stages.spans import agreed_spans
from pear_data.store.views import Views
from pear_data.weighting import log_ratios


@dataclass(frozen=True, slots=True)
class SampleTokens:
    """A sample of L tokens, T of them scored."""

    sample_id: str
    source: str
    label: int
    status: str
    tokens: list[str]  # [L], as the tokenizer's vocabulary shows them
    loss_mask: npt.NDArray[np.bool_]  # [L]
    weights: npt.NDArray[np.float32] | None  # [T]; None where the status gives it none
    log_ratios: npt.NDArray[np.float64] | None  # [T], unclipped

    @property
    def ess_ratio(self) -> float | None:
        """Effective sample size over T."""
        if self.weights is None or not self.weights.any():
            return None
        weights = self.weights.astype(np.float64)
        return float(weights.sum() ** 2 / (weights**2).sum() / len(weights))


def read_sample(views: Views, sample_id: str, settings: WeightSettings) -> SampleTokens:
    """A sample as one weighting sees it.

    Raises:
        UsageError: the corpus has no such sample.
    """
    found = views.rows(
        "SELECT source, label, input_ids, loss_mask, num_scored FROM corpus WHERE sample_id = ?", [sample_id]
    )
    if not found:
        raise UsageError(
            f"there is no sample {sample_id!r}: `pear-data sql 'select sample_id from samples limit 10'` shows some"
        )
    source, label, input_ids, loss_mask, _ = found[0]
    status, weights = views.rows(
        "SELECT coalesce(any_value(status), 'not weighted yet'), any_value(weights) FROM weights"
        " WHERE name = ? AND sample_id = ?",
        [settings.stored_name, sample_id],
    )[0]
    return SampleTokens(
        sample_id=sample_id,
        source=source,
        label=label,
        status=status,
        tokens=_texts(views, sample_id, input_ids),
        loss_mask=np.asarray(loss_mask, dtype=np.bool_),
        weights=None if weights is None else np.asarray(weights, dtype=np.float32),
        log_ratios=_log_ratios(views, sample_id, settings),
    )


def _log_ratios(views: Views, sample_id: str, settings: WeightSettings) -> npt.NDArray[np.float64] | None:
    found = {
        policy: (np.asarray(logprobs, np.float32), spans)
        for policy, logprobs, spans in views.rows(
            "SELECT policy, logprobs, span_tokens FROM scores"
            " WHERE policy IN (?, ?) AND sample_id = ? AND status = 'ok'",
            [settings.target, settings.behavior, sample_id],
        )
    }
    if len(found) < 2:
        return None
    (target, first), (behavior, second) = found[settings.target], found[settings.behavior]
    return log_ratios(target, behavior, agreed_spans(first, second))


def _texts(views: Views, sample_id: str, input_ids: list[int]) -> list[str]:
    text = dict(
        views.rows(
            "SELECT token_id, token FROM stored.vocabulary WHERE token_id IN"
            " (SELECT unnest(input_ids) FROM corpus WHERE sample_id = ?)",
            [sample_id],
        )
    )
    # Without a tokenizer in the store the ids are all there is to show.
    return [text.get(token_id, f"[{token_id}]") for token_id in input_ids]
