"""The far side: an engine opened and asked where it runs, its answers and its troubles as records that travel.

Local processes and Ray actors share this; each has its own way to carry the records.
"""

from __future__ import annotations

import gc
import sys
import traceback
from dataclasses import dataclass
from typing import NoReturn

from pear_data import errors
from pear_data.engines.base import Engine, OnTokens
from pear_data.errors import PearError
from pear_data.redaction import redacted
from pear_data.runners.base import EngineFailedError, Facts, Floats, OpenEngine
from pear_data.tokens import TokenBatch

_NO_CPU_MEMORY = "DefaultCPUAllocator"  # a CPU without memory raises a plain RuntimeError that names it


@dataclass(frozen=True, slots=True)
class Trouble:
    """An exception, as it travels. `kind` is the name of one of our errors, or "" for any other."""

    kind: str
    reason: str
    trace: str
    usable: bool = False

    @classmethod
    def of(cls, error: Exception) -> Trouble:
        trace = redacted("".join(traceback.format_exception(error)))
        if isinstance(error, PearError):
            return cls(type(error).__name__, redacted(str(error)), trace)
        reason = redacted(f"{type(error).__name__}: {_first_line(error)}")
        if _out_of_memory(error):
            return cls("", f"out of memory ({reason})", trace, usable=True)
        # An engine refuses a sample it cannot take with a ValueError, before it starts (`Engine.score`).
        return cls("", reason, trace, usable=isinstance(error, ValueError))

    def raise_at_start(self) -> NoReturn:
        """Raise what opening an engine ran into."""
        self._raise(self.reason if self.kind else f"the engine does not start: {self.reason}")

    def raise_at_work(self) -> NoReturn:
        """Raise what scoring ran into. A plain PearError is how an engine words its own end: a fault like any other."""
        if self.kind in ("", PearError.__name__):
            raise EngineFailedError(self.reason, self.usable)
        self._raise(self.reason)

    def _raise(self, message: str) -> NoReturn:
        error: PearError = getattr(errors, self.kind or PearError.__name__)(message)
        error.add_note(self.trace)  # for --debug
        raise error


class ServedEngine:
    """An engine behind two calls that never raise; also what a Ray actor is made of."""

    def __init__(self, open_engine: OpenEngine) -> None:
        self._open = open_engine
        self._engine: Engine | None = None

    def placed(self) -> None:
        """Answers once this object exists where it is to work."""

    def open(self) -> Facts | Trouble:
        """Load the model."""
        try:
            engine, sentence = self._open()
            self._engine = engine
            return Facts(engine.name, engine.batch_tokens, engine.max_length, engine.identity(), sentence)
        except Exception as error:
            return Trouble.of(error)

    def score(self, batch: TokenBatch, on_tokens: OnTokens = lambda count: None) -> Floats | Trouble:
        """`Engine.score`."""
        assert self._engine is not None
        try:
            return self._engine.score(batch, on_tokens)
        except Exception as error:
            trouble = Trouble.of(error)
        # Only here, where the exception and the frames it held are gone, is their memory free.
        _free_memory()
        return trouble

    def close(self) -> None:
        """`Engine.close`."""
        if self._engine is not None:
            self._engine.close()


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and _NO_CPU_MEMORY in str(error))
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    )


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
