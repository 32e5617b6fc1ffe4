"""Live PEAR: importance weights from the trained model's own log-probs, formed on the device in every step.

The paper's training loop. The dataset carries the behavior policy's log-probs; the target policy is the model as it
is now. Everything is arithmetic over whole arrays, of shapes known beforehand: no loop, and nothing that waits for the
device.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Level = Literal["token", "block", "sequence"]


def live_weights(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    sequence_ids: Tensor | None = None,
    *,
    level: Level = "block",
    block_size: int = 4,
    gamma: float = 0.999,
    clip_log_ratio: tuple[float, float] = (-0.08, 0.3),
    clip_log_weight: tuple[float, float] = (-10.0, 5.0),
    negative: Tensor | None = None,
    negative_scale: float = 0.0,
) -> Tensor:
    """Importance weights (PEAR 3.2 to 3.7), float32, detached, of the shape of `logprobs`; 0 where nothing is scored.

    `logprobs` and `behavior_logprobs` (natural log) and `mask` (true or 1 where a token is scored) are [B, L] or [N],
    entry i of each belonging to the same predicted token. A row is one sequence, or as many as `sequence_ids` has runs
    of equal ids in it (packs; see `alignment.sequence_ids`). What stands outside the mask is never used and may be
    non-finite. Sums are in float64. `negative`, true over the tokens of samples marked negative, gives these
    `-negative_scale` times their sequence-level weight (3.6).

    Raises ValueError for shapes that differ and settings outside their bounds.
    """
    settings = LivePear(level, block_size, gamma, clip_log_ratio, clip_log_weight, negative_scale)
    return settings.weights(logprobs, behavior_logprobs, mask, sequence_ids, negative)


@dataclass(frozen=True, slots=True)
class LivePear:
    """Settings of live weights: those of `pear-data weight` that need no more than a sequence's own log-ratios."""

    level: Level = "block"
    block_size: int = 4
    gamma: float = 0.999
    clip_log_ratio: tuple[float, float] = (-0.08, 0.3)
    clip_log_weight: tuple[float, float] = (-10.0, 5.0)
    negative_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.level not in ("token", "block", "sequence"):
            raise ValueError(f"level is {self.level!r}: token, block or sequence")
        if self.block_size < 1 or not 0 < self.gamma <= 1 or self.negative_scale < 0:
            raise ValueError(f"{self}: block_size >= 1, 0 < gamma <= 1, negative_scale >= 0")
        for name in ("clip_log_ratio", "clip_log_weight"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name} is {low} to {high}: the lower bound comes first")

    @classmethod
    def from_export(cls, folder: str | Path) -> LivePear:
        """The settings that `pear-data export --live` wrote beside the dataset.

        Raises ValueError where `folder` holds no such export.
        """
        path = Path(folder) / "pear_export.json"
        try:
            live = json.loads(path.read_text())["live"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is no export's manifest ({error}): export with --live") from error
        if not live:
            raise ValueError(f"{path} has no settings of live weights: export with --live")
        settings: dict[str, Any] = {
            name: tuple(live[name]) if isinstance(live[name], list) else live[name]
            for name in {field.name for field in fields(cls)} & live.keys()
        }
        return cls(**settings)

    def weights(
        self,
        logprobs: Tensor,
        behavior_logprobs: Tensor,
        mask: Tensor,
        sequence_ids: Tensor | None = None,
        negative: Tensor | None = None,
    ) -> Tensor:
        """`live_weights` with these settings."""
        _require_one_shape(
            logprobs=logprobs,
            behavior_logprobs=behavior_logprobs,
            mask=mask,
            sequence_ids=sequence_ids,
            negative=negative,
        )
        scored = mask.bool()
        ratios = self._log_ratios(logprobs, behavior_logprobs).masked_fill(~scored, 0.0).reshape(-1)
        spans = _spans(scored, sequence_ids)
        # Slot `rank` of `ratios_by_rank` is the rank-th scored token's; what is not scored adds 0 to a slot.
        ratios_by_rank = ratios.new_zeros(ratios.numel() + 1).scatter_add_(0, spans.rank, ratios)
        sums = _suffix_sums(ratios_by_rank)
        weights = self._weights(spans, sums, None if negative is None else negative.reshape(-1).bool())
        return weights.view(logprobs.shape).masked_fill(~scored, 0.0)

    def _log_ratios(self, logprobs: Tensor, behavior_logprobs: Tensor) -> Tensor:
        ratios = logprobs.detach().double() - behavior_logprobs.to(logprobs.device).double()
        return ratios.clamp(*self.clip_log_ratio)

    def _weights(self, spans: _Spans, sums: Tensor, negative: Tensor | None) -> Tensor:
        """float32, one for each entry of `spans`. `sums[r]`: log-ratios of the r-th scored token and all after it."""
        weights = self._weights_of_level(spans, sums, self.level)
        if negative is None:
            return weights
        of_negatives = self._weights_of_level(spans, sums, "sequence") * -self.negative_scale
        return torch.where(negative, of_negatives, weights)

    def _weights_of_level(self, spans: _Spans, sums: Tensor, level: Level) -> Tensor:
        after, discount = spans.continuation(level, self.block_size)
        log_weights = sums[after] - sums[spans.end] + discount * math.log(self.gamma)
        return log_weights.clamp(*self.clip_log_weight).exp().float()


class LiveWeightsOfRows:
    """Live weights for `linear_weighted_nll`, which asks for them a chunk at a time, from the last chunk to the first.

    A token's weight rests on the tokens after it (its block's too), so by then all it takes is known. For the level
    `sequence`, and where there are negatives, it rests on the whole sequence: chunks then consist of whole ones.
    """

    def __init__(
        self,
        settings: LivePear,
        behavior_logprobs: Tensor,
        mask: Tensor,
        sequence_ids: Tensor | None = None,
        negative: Tensor | None = None,
    ) -> None:
        """The arguments as in `live_weights`; `mask` is where targets are not ignored.

        Raises ValueError for shapes that differ.
        """
        _require_one_shape(
            behavior_logprobs=behavior_logprobs, mask=mask, sequence_ids=sequence_ids, negative=negative
        )
        self._settings = settings
        self._behavior = behavior_logprobs.reshape(-1)
        self._mask = mask.reshape(-1).bool()
        self._negative = None if negative is None else negative.reshape(-1).bool()
        self._spans = _spans(mask.bool(), sequence_ids)
        self._sums = torch.zeros(mask.numel() + 1, dtype=torch.float64, device=mask.device)

    def __call__(self, rows: Tensor, logprobs: Tensor) -> Tensor:
        """float32 [n] for `rows`: ascending, all scored, and just before those of the call before."""
        ratios = self._settings._log_ratios(logprobs, self._behavior[rows])
        spans = self._spans.of(rows)
        self._sums[spans.rank] = _suffix_sums(ratios)[:-1] + self._sums[spans.rank[-1:] + 1]
        negative = None if self._negative is None else self._negative[rows]
        return self._settings._weights(spans, self._sums, negative)

    def begins_of_sequences(self) -> Tensor | None:
        """Ranks among the scored tokens [S], ascending, where calls must be parted; None where they may be anywhere."""
        if self._settings.level != "sequence" and self._negative is None:
            return None
        return self._spans.rank[self._mask & (self._spans.rank == self._spans.begin)]

    def longest_sequence(self) -> int:
        """Its scored tokens."""
        lengths = self._spans.end - self._spans.begin
        return int(lengths.max()) if len(lengths) else 0


@dataclass(frozen=True, slots=True)
class _Spans:
    """For each entry: how many tokens are scored before it, its sequence and its sequence's end. int64 [N]."""

    rank: Tensor
    begin: Tensor
    end: Tensor

    def of(self, rows: Tensor) -> _Spans:
        return _Spans(self.rank[rows], self.begin[rows], self.end[rows])

    def continuation(self, level: Level, block_size: int) -> tuple[Tensor, Tensor]:
        """Rank of the first token whose log-ratio counts, and the number of tokens that count for the discount."""
        if level == "sequence":
            return self.begin, torch.zeros_like(self.begin)
        size = 1 if level == "token" else block_size
        past = self.begin + ((self.rank - self.begin) // size + 1) * size
        after = torch.minimum(past, self.end)
        return after, self.end - after


def _spans(scored: Tensor, sequence_ids: Tensor | None) -> _Spans:
    count = scored.reshape(-1).long().cumsum(0)
    rank = count - scored.reshape(-1).long()
    starts = torch.zeros_like(scored)
    starts[..., :1] = True
    if sequence_ids is not None:
        ids = sequence_ids.to(scored.device)
        starts[..., 1:] |= ids[..., 1:] != ids[..., :-1]
    starts = starts.reshape(-1)
    begin = torch.where(starts, rank, 0).cummax(0).values
    of_next = torch.cat([torch.where(starts, rank, count[-1:])[1:], count[-1:]])
    end = of_next.flip(0).cummin(0).values.flip(0)
    return _Spans(rank, begin, end)


def _suffix_sums(values: Tensor) -> Tensor:
    """[n + 1]: entry i sums values i and later; the last is 0."""
    return torch.nn.functional.pad(values.flip(0).cumsum(0).flip(0), (0, 1))


def _require_one_shape(**tensors: Tensor | None) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{found} must have one shape: batch them together, with PearCollator")
