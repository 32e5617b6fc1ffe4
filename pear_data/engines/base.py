"""The protocol every scoring engine keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pear_data.tokens import TokenBatch

OnTokens = Callable[[int], None]


class Engine(Protocol):
    """Log-probs of given tokens under one policy.

    `identity()` is everything about the engine that determines the numbers (engine, version, code path, model,
    revision, weights hash, dtype, engine arguments): JSON scalars only; it goes into the fingerprint of a stage.
    """

    name: str
    batch_tokens: int  # tokens one `score` call should carry to keep the engine busy
    max_length: int  # tokens of the longest sample it can score

    def identity(self) -> dict[str, str | int | float | bool | None]: ...

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> npt.NDArray[np.float32]:
        """Natural-log probabilities of the scored tokens, flat float32 in the batch's order.

        `on_tokens(n)` is called as n more tokens (prompt included) are done. Values may be non-finite where the
        model is; nothing is repaired here. Raises ValueError for a sample longer than `max_length`.
        """
        ...

    def close(self) -> None:
        """Free the model and whatever runs it."""
        ...
