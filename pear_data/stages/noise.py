"""How far a policy's stored log-probs lie from plain transformers in float32, as an audit measured it."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

from pear_data.store.manifest import Stage

DECISION = "audit"  # where a policy's stage keeps its audit
# A clip bounds a log-ratio; noise above a quarter of it moves tokens across the clip that have no business there.
NOISY_SHARE = 0.25
HALF = ("bfloat16", "float16")


class Audit(BaseModel):
    """Differences between stored log-probs and plain transformers in float32, over some samples; in nats."""

    model_config = ConfigDict(extra="forbid")

    samples: int = Field(description="Samples scored again.")
    tokens: int = Field(description="Their scored tokens, which the numbers are over.")
    median: float = Field(description="Median of |stored - reference|, within 0.4 % of its value.")
    p99: float = Field(description="99 % of |stored - reference| are no larger, within 0.4 % of its value.")
    max: float = Field(description="Largest |stored - reference|.")
    mean: float = Field(description="Mean of |stored - reference|.")
    bias: float = Field(description="Mean of stored - reference: what does not average out in a sum.")
    max_sample_id: str = Field(description="Sample of the largest difference.")
    max_position: int = Field(description="Its position in the sample's input_ids.")
    clip_log_ratio: tuple[float, float] = Field(description="Clips the noise was held against.")
    reference: str = Field(description="What scored again: version, precision and device.")

    @property
    def is_noisy(self) -> bool:
        """Whether the noise is comparable to the clips."""
        return self.p99 > noise_limit(self.clip_log_ratio)


def stored_audit(stage: Stage) -> Audit | None:
    """The last audit of a policy's stage; None where there was none."""
    found = stage.decisions.get(DECISION)
    return None if found is None else Audit.model_validate(found)


def smaller_clip(clip_log_ratio: tuple[float, float]) -> float:
    """Distance from 0 to the nearer clip that is not 0 itself; infinite where both are 0."""
    return min((abs(bound) for bound in clip_log_ratio if bound), default=math.inf)


def noise_limit(clip_log_ratio: tuple[float, float]) -> float:
    """Noise (p99, nats) from which on clipping is partly noise."""
    return NOISY_SHARE * smaller_clip(clip_log_ratio)
