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
    log_ratios: npt.NDArray[np.float64] | None  # [T], unclipped and uncentered

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
        "SELECT source, label, input_ids, loss_mask FROM corpus WHERE sample_id = ?", [sample_id]
    )
    if not found:
        raise UsageError(
            f"there is no sample {sample_id!r}: `pear-data sql 'select sample_id from samples limit 10'` shows some"
        )
    source, label, input_ids, loss_mask = found[0]
    status, weights = weights_of(views, sample_id).get(settings.stored_name, ("not weighted yet", None))
    return SampleTokens(
        sample_id=sample_id,
        source=source,
        label=label,
        status=status,
        tokens=_texts(views, input_ids),
        loss_mask=np.asarray(loss_mask, dtype=np.bool_),
        weights=weights,
        log_ratios=_log_ratios(views, sample_id, settings),
    )


def weights_of(views: Views, sample_id: str) -> dict[str, tuple[str, npt.NDArray[np.float32] | None]]:
    """A sample's status and weights [T] under each weighting that has come to it."""
    return {
        name: (status, None if weights is None else np.asarray(weights, dtype=np.float32))
        for name, status, weights in views.rows(
            "SELECT name, status, weights FROM weights WHERE sample_id = ?", [sample_id]
        )
    }


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


def _texts(views: Views, input_ids: list[int]) -> list[str]:
    text = dict(
        views.rows(
            "SELECT token_id, token FROM stored.vocabulary WHERE token_id IN (SELECT unnest(?::INTEGER[]))",
            [sorted(set(input_ids))],
        )
    )
    # Without a tokenizer in the store the ids are all there is to show.
    return [text.get(token_id, f"[{token_id}]") for token_id in input_ids]
