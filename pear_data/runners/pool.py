"""Several engines of one policy as one scorer: every batch goes to an idle one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pear_data.engines.base import OnTokens
from pear_data.errors import MismatchError, PearError
from pear_data.runners.base import Facts, Identity, Scored
from pear_data.runners.supervised import SupervisedScorer, WorkerGoneError
from pear_data.store.manifest import differing_fields
from pear_data.tokens import TokenBatch


class ScorerPool:
    """A `Scorer` (see `pear_data.runners.base`) for as many threads at once as it has `workers`.

    A worker that is gone leaves its batch to another one. `ready` comes first.

    Args:
        scorers: one per worker.
        say: told when a worker is gone.
    """

    def __init__(self, scorers: Sequence[SupervisedScorer], say: Callable[[str], None]) -> None:
        self.workers = len(scorers)
        self._scorers = list(scorers)
        self._say = say
        self._idle = list(scorers)
        self._left = len(scorers)
        self._change = threading.Condition()

    def ready(self) -> Facts:
        """Wait until every model is loaded.

        Raises:
            PearError: one cannot be.
            MismatchError: the workers' engines differ in what determines the numbers.
        """
        first, *others = [scorer.ready() for scorer in self._scorers]
        for other in others:
            if other.identity != first.identity:
                fields = "; ".join(differing_fields(first.identity, other.identity))
                raise MismatchError(
                    f"the workers would not give the same numbers ({fields}): give them the same model files, "
                    "packages and devices"
                )
        return first

    @property
    def name(self) -> str:
        return self._scorers[0].name

    @property
    def batch_tokens(self) -> int:
        return self._scorers[0].batch_tokens

    @property
    def max_length(self) -> int:
        return min(scorer.max_length for scorer in self._scorers)

    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        return self._scorers[0].identity()

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> Scored:
        """See `Scorer.score`; waits for an idle engine."""
        while True:
            scorer = self._take()
            try:
                scored = scorer.score(batch, on_tokens)
            except WorkerGoneError as error:
                self._drop(error)
            except BaseException:
                self._give_back(scorer)
                raise
            else:
                self._give_back(scorer)
                return scored

    def close(self) -> None:
        """See `Scorer.close`."""
        for scorer in self._scorers:
            scorer.close()

    def _take(self) -> SupervisedScorer:
        with self._change:
            self._change.wait_for(lambda: self._idle or not self._left)
            if not self._left:
                raise PearError("no worker is left")
            return self._idle.pop()

    def _give_back(self, scorer: SupervisedScorer) -> None:
        with self._change:
            self._idle.append(scorer)
            self._change.notify()

    def _drop(self, error: WorkerGoneError) -> None:
        """Raises `error` where this was the last worker."""
        with self._change:
            self._left -= 1
            self._change.notify_all()
            if not self._left:
                raise error
        self._say(f"{error}; going on with {self._left} of {self.workers} workers")
