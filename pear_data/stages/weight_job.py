"""What travels to a worker that weights one shard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pear_data.config import WeightSettings
from pear_data.stages.text_blocks import BlockCutter
from pear_data.store.manifest import CORPUS, FileEntry, Shard


@dataclass(frozen=True, slots=True)
class Weighting:
    """One weighting, with what its settings make of the whole corpus."""

    settings: WeightSettings
    center: float = 0.0  # subtracted from every log-ratio
    scale: float = 1.0  # factor of every weight
    cutter: BlockCutter | None = None  # where blocks are pieces of text

    @property
    def key(self) -> str:
        """The stage."""
        return f"weights/{self.settings.stored_name}"


@dataclass(frozen=True, slots=True)
class WeightJob:
    """One shard to weight in one pass over its log-probs, by all weightings that lack it."""

    root: Path
    name: str
    target_policy: str
    behavior_policy: str
    corpus: Shard
    target: Shard
    behavior: Shard | None  # None where baselines are made without
    weightings: tuple[Weighting, ...]

    @property
    def needs_text(self) -> bool:
        """Whether token ids are read."""
        return any(weighting.cutter is not None for weighting in self.weightings)

    @property
    def shares_ratios(self) -> bool:
        """Whether all weightings meet the same log-ratios and clips, so that these need to be measured once only."""
        first, *others = self.weightings
        return all(
            (one.center, one.settings.center, one.settings.clip_log_ratio, one.settings.per_source)
            == (first.center, first.settings.center, first.settings.clip_log_ratio, first.settings.per_source)
            for one in others
        )

    @property
    def inputs(self) -> dict[str, str]:
        """sha256 of each file the weights are made from, by stage."""
        inputs = {CORPUS: self.corpus.file.sha256, f"scores/{self.target_policy}": self.target.file.sha256}
        if self.behavior is not None:
            inputs[f"scores/{self.behavior_policy}"] = self.behavior.file.sha256
        return inputs

    @property
    def corpus_summary(self) -> FileEntry:
        """Where source and label are read; corpora of the first format have them among their tokens only."""
        return self.corpus.summary or self.corpus.file

    @property
    def files(self) -> list[FileEntry]:
        """Every file that is read."""
        files = [self.corpus_summary, self.target.file]
        files += [self.behavior.file] if self.behavior is not None else []
        return files + ([self.corpus.file] if self.needs_text else [])
