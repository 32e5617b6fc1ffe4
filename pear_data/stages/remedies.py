"""What to add to `pear-data weight` against a fault of a weighting, worked out from its own totals.

What mends most is to balance: each token is held against its own sample's mean log-ratio, with clips under which sums
do not drift (`pear_data.stages.clips`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field

from pear_data.config import Bounds, WeightSettings
from pear_data.stages import clips
from pear_data.stages.histogram import Histogram, top_share
from pear_data.stages.measure import Totals


class Remedy(BaseModel):
    """One way to mend a fault. Of several, the first mends most."""

    model_config = ConfigDict(extra="forbid")

    options: list[str] = Field(
        description="What to give the `pear-data weight` that made the weights, in place of what these options were "
        "given; empty where no option helps."
    )
    text: str = Field(description="The same for people, and why.")
    file: str | None = Field(default=None, description="What FILE holds where options name one (YAML).")


NEARER = Remedy(options=[], text="a behavior policy nearer to the target")


def changes(remedy: Remedy, settings: WeightSettings) -> bool:
    """Whether a remedy is anything but what the weighting was made with already."""
    if not remedy.options or remedy.file is not None:
        return True
    flags = [place for place, option in enumerate(remedy.options) if option.startswith("--")]
    for start, end in zip(flags, [*flags[1:], len(remedy.options)], strict=True):
        name, *values = remedy.options[start:end]
        present = getattr(settings, name.removeprefix("--").replace("-", "_"))
        if tuple(type(known)(text) for known, text in zip(_each(present), values, strict=True)) != _each(
            present
        ):
            return True
    return False


def _each(present: Any) -> tuple[Any, ...]:
    return present if isinstance(present, tuple) else (present,)


def balance(totals: Totals, settings: WeightSettings) -> Remedy:
    """Center samples, with clips under which nothing drifts."""
    bounds, gamma = clips.balanced_clips(totals, settings)
    options = [*_centered(settings), "--clip-log-ratio", *_shown(bounds)]
    if gamma != settings.gamma:
        options += ["--gamma", _text(gamma)]
    return Remedy(
        options=options,
        text=f"{' '.join(options)} (each token against its sample's mean, with clips that balance)",
    )


def balance_sources(sources: Mapping[str, Totals], settings: WeightSettings) -> Remedy:
    """Center samples, with clips of its own for every source."""
    entries = {
        name: _balanced_entry(totals, of_source(settings, name))
        for name, totals in sources.items()
        if totals.tokens
    }
    why = "each token against its sample's mean, with clips that balance each source"
    return _per_source([*_centered(settings), "--per-source", "FILE"], entries, settings, why)


def damp_sources(sources: Mapping[str, Totals], settings: WeightSettings) -> Remedy:
    """For these sources alone log-ratio clips so small that no sum goes far."""
    entries = {name: _damped_entry(totals, of_source(settings, name)) for name, totals in sources.items()}
    return _per_source(["--per-source", "FILE"], entries, settings, "there, smaller clips for smaller sums")


def damp(totals: Totals, settings: WeightSettings) -> Remedy:
    """Log-ratio clips so small that no sum goes far; the discount goes too where it would."""
    bounds, gamma = clips.damped_clips(totals, settings)
    options = ["--clip-log-ratio", *_shown(bounds)]
    if gamma != settings.gamma:
        options += ["--gamma", _text(gamma)]
    return Remedy(options=options, text=f"{' '.join(options)} (smaller sums)")


def bound_weights(weights: Histogram, settings: WeightSettings, least_ess: float) -> Remedy:
    """The widest log-weight clip around 0 that leaves an effective sample size of `least_ess` of the tokens."""
    for reach in (5.0, 4.0, 3.0, 2.0, 1.5, 1.0):
        low, high = (min(max(bound, -reach), reach) for bound in settings.clip_log_weight)
        clipped = np.clip(weights.means, math.exp(low), math.exp(high))
        total = float(weights.counts @ clipped)
        if total**2 >= least_ess * weights.total * float(weights.counts @ clipped**2):
            break
    at_bounds = weights.counts[(clipped == clipped.min()) | (clipped == clipped.max())].sum()
    options = ["--clip-log-weight", *_shown((low, high))]
    share = f"{100 * at_bounds / weights.total:.3g} %"
    return Remedy(
        options=options,
        text=f"{' '.join(options)} (bounds the damage, with {share} of the weights at a bound)",
    )


def cap_weights(
    histograms: Sequence[Histogram], settings: WeightSettings, most_mass: float, share: float
) -> Remedy:
    """The highest upper log-weight clip under which, in each histogram, `share` of the weights hold no more than
    `most_mass` of their sum."""
    cap = min(_cap(weights, most_mass, share) for weights in histograms)
    options = ["--clip-log-weight", *_shown((settings.clip_log_weight[0], math.log(cap)))]
    return Remedy(options=options, text=f"{' '.join(options)} (caps the largest)")


def _cap(weights: Histogram, most_mass: float, share: float) -> float:
    for quantile in (0.99, 0.98, 0.95, 0.9, 0.75, 0.5):
        cap = float(weights.quantiles([quantile])[0])
        if top_share(np.minimum(weights.means, cap), weights.counts, share) <= most_mass:
            break
    return cap


def widen(settings: WeightSettings, least: float) -> Remedy:
    """Log-ratio clips at least this far from 0, a little more for the noise there may be."""
    low, high = settings.clip_log_ratio
    wide = math.ceil(110 * least) / 100
    options = ["--clip-log-ratio", *_shown((min(low, -wide), max(high, wide)))]
    return Remedy(options=options, text=f"{' '.join(options)} (wider clips, beside which the noise is small)")


def one_weight_a_sample(settings: WeightSettings) -> Remedy:
    """The sequence level, its weights brought to a mean of 1: sums over whole samples may be far from 0."""
    options = ["--level", "sequence"]
    if settings.normalize != "corpus":
        options += ["--normalize", "corpus"]
    if settings.block_by != "tokens":
        options += ["--block-by", "tokens"]
    return Remedy(options=options, text=f"{' '.join(options)} (one weight for all tokens of a sample)")


def normalize(whose: str, why: str) -> Remedy:
    """Weights with a mean of 1."""
    return Remedy(options=["--normalize", whose], text=f"--normalize {whose} ({why})")


def in_words(text: str) -> Remedy:
    """A remedy that is no option of weight."""
    return Remedy(options=[], text=text)


def of_source(settings: WeightSettings, source: str) -> WeightSettings:
    """The settings with what one source has of its own in their place."""
    own = settings.per_source.get(source)
    return settings.model_copy(update=own.model_dump(exclude_none=True)) if own else settings


def _centered(settings: WeightSettings) -> list[str]:
    return [] if settings.center == "sample" else ["--center", "sample"]


def _balanced_entry(totals: Totals, settings: WeightSettings) -> dict[str, Bounds | float]:
    return _entry(settings, *clips.balanced_clips(totals, settings))


def _damped_entry(totals: Totals, settings: WeightSettings) -> dict[str, Bounds | float]:
    return _entry(settings, *clips.damped_clips(totals, settings))


def _entry(settings: WeightSettings, bounds: Bounds, gamma: float) -> dict[str, Bounds | float]:
    return {"clip_log_ratio": bounds, **({"gamma": gamma} if gamma != settings.gamma else {})}


def _per_source(
    options: list[str],
    entries: Mapping[str, Mapping[str, Bounds | float]],
    settings: WeightSettings,
    why: str,
) -> Remedy:
    """Entries of single sources, laid over those that the weighting has already."""
    file = {
        name: entry.model_dump(mode="json", exclude_none=True) for name, entry in settings.per_source.items()
    }
    for name, entry in entries.items():
        chosen = {
            key: [float(bound) for bound in _shown(value)] if isinstance(value, tuple) else value
            for key, value in entry.items()
        }
        file[name] = {**file.get(name, {}), **chosen}
    return Remedy(
        options=options,
        text=f"{' '.join(options)} ({why}; --format json has FILE)",
        file=yaml.safe_dump(file, sort_keys=False, default_flow_style=None),
    )


def _shown(bounds: Bounds) -> tuple[str, str]:
    """Bounds as an option takes them."""
    low, high = map(_text, bounds)
    return low, high


def _text(value: float) -> str:
    """A number as an option takes it; adding 0 turns -0 into 0."""
    return f"{value + 0.0:.3g}"
