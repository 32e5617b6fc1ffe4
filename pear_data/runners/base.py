"""What stages ask for scores (`Scorer`), and what runs an engine for one elsewhere (`Host`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pear_data.engines.base import Engine, OnTokens
from pear_data.tokens import TokenBatch

Floats = npt.NDArray[np.float32]
Identity = dict[str, str | int | float | bool | None]
# Gives an engine and one sentence about it; travels to where the engine is to run, so it must be picklable.
OpenEngine = Callable[[], tuple[Engine, str]]


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probs of a batch's scored tokens. Rows in `failures` could not be scored; theirs are arbitrary."""

    logprobs: Floats  # flat, in the batch's order
    failures: Mapping[int, str]  # row of the batch -> why


class Scorer(Protocol):
    """Log-probs of given tokens under one policy, whatever happens to the engine that computes them.

    `name`, `batch_tokens`, `max_length` and `identity()` are the engine's, see `pear_data.engines.base.Engine`.
    """

    @property
    def name(self) -> str: ...

    @property
    def batch_tokens(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    def identity(self) -> Identity: ...

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> Scored:
        """Score a batch. `on_tokens(n)` is called as n more tokens are done, with n < 0 where they were lost again.

        Raises:
            PearError: the engine fails on everything, cannot be restarted, or was closed.
            UsageError, MismatchError: as the engine raised them.
        """
        ...

    def close(self) -> None:
        """End the engine; from another thread also while it scores, which then raises."""
        ...


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine says of itself once its model is loaded."""

    name: str
    batch_tokens: int
    max_length: int
    identity: Identity
    sentence: str


class EngineLostError(Exception):
    """The engine is gone, with its process or its node; the message says how it ended."""


class EngineFailedError(Exception):
    """The engine raised on a batch; the message is the reason. `usable`: it can score on as it is."""

    def __init__(self, reason: str, usable: bool) -> None:
        super().__init__(reason)
        self.usable = usable


class Host(Protocol):
    """One engine at work somewhere else, from its start to its end."""

    def ready(self) -> Facts:
        """Wait until the model is loaded.

        Raises:
            PearError: as the engine raised it, or why there is no engine.
            EngineLostError: it was gone before the model was loaded.
        """
        ...

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> Floats:
        """`Engine.score`.

        Raises:
            EngineFailedError, EngineLostError: see there.
            UsageError, MismatchError: as the engine raised them.
        """
        ...

    def stop(self) -> None:
        """End the engine and free what it held; from any thread, and more than once."""
        ...
