"""The layouts an export can have. One module a family; this is what they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pear_data.config import ExportSettings
from pear_data.stages.export.rows import Rows
from pear_data.store import Store

Form = str
Write = Callable[[Rows], int]

GROUP_TOKENS = 1 << 20
UNSHIFTED = (
    "loss_weights[t] multiplies -log p(input_ids[t] | input_ids[<t]): unshifted, at the index of the label; "
    "0 where not scored, so index 0 is 0"
)
PER_LABEL = "sum(loss_weights * nll) / count(labels != -100)"


@dataclass(frozen=True, slots=True)
class Format:
    """One layout.

    alignment     which token a weight multiplies
    normaliser    the loss that its trainer makes of the weights
    open          a file to write rows to: a context that gives a function, which returns the rows (or packs) it wrote;
                  the file stands at its path when the context ends well
    advice        what to do next, for the screen
    admitted      the samples it can hold as they are, and how many it cannot, by reason; raises PearError where it
                  would drop or cast a value
    flags         what its trainer must be given, or the weights are lost
    group_tokens  tokens that are written at once, which bounds memory
    """

    suffix: str
    alignment: str
    normaliser: str
    open: Callable[[Path], AbstractContextManager[Write]]
    advice: str
    admitted: Callable[[Rows], tuple[Rows, Counter[str]]] = lambda rows: (rows, Counter())
    needs_record: bool = False
    flags: str | None = None
    group_tokens: int = GROUP_TOKENS


def format_of(store: Store, settings: ExportSettings) -> Format:
    """The format that `settings` ask for.

    Raises:
        UsageError: the store has not what the format needs.
    """
    from pear_data.stages.export.messages import messages_format
    from pear_data.stages.export.shifted import shifted_format
    from pear_data.stages.export.swift import swift_format
    from pear_data.stages.export.tables import hf_format, packed_format, verl_format

    makers: dict[Form, Callable[[], Format]] = {
        "hf": lambda: hf_format(settings.live),
        "hf-packed": lambda: packed_format(settings.max_length or 0, settings.live),
        "verl": verl_format,
        "swift": lambda: swift_format(store),
        "shifted": lambda: shifted_format(settings.max_length),
        "messages": lambda: messages_format(store, settings),
    }
    return makers[settings.format]()
