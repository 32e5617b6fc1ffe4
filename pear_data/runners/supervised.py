"""A scorer over one host: an engine that dies is started again, its batch halved until the sample at fault is found."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from pear_data.engines.base import OnTokens
from pear_data.errors import MismatchError, PearError
from pear_data.runners.base import EngineFailedError, EngineLostError, Facts, Floats, Host, Identity, Scored
from pear_data.store.manifest import differing_fields
from pear_data.tokens import TokenBatch

FAILURES_IN_A_ROW = 3  # with nothing scored between them, the samples are not to blame


class WorkerGoneError(PearError):
    """The engine cannot be started again in its place; the batch is not to blame."""


class SupervisedScorer:
    """A `Scorer` (see `pear_data.runners.base`) that survives its engine. One thread at a time scores with it.

    The engine starts at once; whatever needs it waits for it.

    Args:
        open_host: starts an engine, the first and every one after it, without waiting for it.
        say: told when an engine is started again, and why.
        note: told when a batch is halved, and why.
    """

    def __init__(
        self,
        open_host: Callable[[], Host],
        say: Callable[[str], None],
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._open_host = open_host
        self._say, self._note = say, note
        self._host = open_host()
        self._facts: Facts | None = None
        self._failed_in_a_row = 0
        self._closed = False
        self._replacing = threading.Lock()

    def ready(self) -> Facts:
        """Wait until the model is loaded. Raises PearError where it cannot be."""
        if self._facts is None:
            self._facts = self._loaded()
        return self._facts

    @property
    def name(self) -> str:
        return self.ready().name

    @property
    def batch_tokens(self) -> int:
        return self.ready().batch_tokens

    @property
    def max_length(self) -> int:
        return self.ready().max_length

    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        return self.ready().identity

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> Scored:
        """See `Scorer.score`. Raises WorkerGoneError where the engine cannot be started again."""
        self.ready()
        done = _Count(on_tokens)
        try:
            return self._bisect(batch, done)
        except WorkerGoneError:
            done.undo()
            raise

    def close(self) -> None:
        """See `Scorer.close`."""
        with self._replacing:
            self._closed = True
            self._host.stop()

    def _bisect(self, batch: TokenBatch, on_tokens: OnTokens) -> Scored:
        offsets = batch.scored_offsets
        logprobs = np.zeros(offsets[-1], dtype=np.float32)
        failures: dict[int, str] = {}
        left = [(0, len(batch), False)]  # stretches of rows, and whether one was tried before
        while left:
            start, end, again = left.pop()
            try:
                found = self._attempt(batch.take(range(start, end)), on_tokens)
            except (EngineFailedError, EngineLostError) as error:
                lost = isinstance(error, EngineLostError)
                if not (isinstance(error, EngineFailedError) and error.usable):
                    self._restart(error)
                # Whoever kills a process, it need not be the batch: all of it, and one sample alone, get another try.
                if lost and not again and end - start in (1, len(batch)):
                    left.append((start, end, True))
                elif end - start == 1:
                    failures[start] = str(error)
                    on_tokens(int(batch.num_tokens[start]))
                    self._count_failure(batch.sample_ids[start], error)
                else:
                    self._note(
                        f"The {end - start} samples from {batch.sample_ids[start]} on failed ({error}) and are halved."
                    )
                    middle = (start + end) // 2
                    left += [(middle, end, False), (start, middle, False)]
            else:
                self._failed_in_a_row = 0
                logprobs[offsets[start] : offsets[end]] = found
        return Scored(logprobs, failures)

    def _attempt(self, batch: TokenBatch, on_tokens: OnTokens) -> Floats:
        done = _Count(on_tokens)
        try:
            found = self._host.score(batch, done)
        except (EngineFailedError, EngineLostError):
            done.undo()
            raise
        done(int(batch.offsets[-1]) - done.total)
        expected = int(batch.loss_mask.sum())
        if len(found) != expected:
            raise PearError(
                f"{self.name} gave {len(found)} log-probs for {expected} scored tokens from sample "
                f"{batch.sample_ids[0]} on: nothing of this shard is kept; try --engine transformers"
            )
        return found

    def _loaded(self) -> Facts:
        try:
            return self._host.ready()
        except EngineLostError as error:
            raise PearError(
                f"the engine ended before its model was loaded: {error}; VLLM_LOGGING_LEVEL=INFO shows what it writes"
            ) from None

    def _restart(self, cause: Exception) -> None:
        with self._replacing:
            self._check_open()
            self._say(f"The engine failed ({cause}) and is started again.")
            self._host.stop()
            self._host = self._open_host()
        try:
            facts = self._loaded()
        except PearError as error:
            self._check_open()
            raise WorkerGoneError(
                f"the engine failed ({cause}) and cannot be started again: {error}"
            ) from None
        before = self.identity()
        if facts.identity != before:
            fields = "; ".join(differing_fields(before, facts.identity))
            raise MismatchError(
                f"the engine failed ({cause}) and, started again, is another one ({fields}): leave the model and the "
                "installation as they are while a policy is scored"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise PearError("the engine was closed while it scored")

    def _count_failure(self, sample_id: str, error: Exception) -> None:
        self._failed_in_a_row += 1
        if self._failed_in_a_row == FAILURES_IN_A_ROW:
            raise PearError(
                f"{self.name} failed on {FAILURES_IN_A_ROW} samples in a row, the last of them {sample_id}: {error}; "
                "finished shards are kept: mend that, then give the same command again"
            )


class _Count:
    """Passes counts on, and takes them back where the work was lost."""

    def __init__(self, on_tokens: OnTokens) -> None:
        self.total = 0
        self._on_tokens = on_tokens

    def __call__(self, count: int) -> None:
        self.total += count
        self._on_tokens(count)

    def undo(self) -> None:
        self(-self.total)
