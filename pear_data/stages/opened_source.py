"""From the settings of a policy to the source of its log-probs, its engines running."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from pear_data.config import ScoreSettings
from pear_data.errors import UsageError
from pear_data.progress import Progress
from pear_data.resources import resolve
from pear_data.runners.opening import open_scorer
from pear_data.stages.foreign_source import foreign_source, foreign_text
from pear_data.stages.same_ids import same_ids_check
from pear_data.stages.sources import PolicySource, engine_source, recorded_source
from pear_data.store import Store


@contextlib.contextmanager
def open_source(store: Store, settings: ScoreSettings, progress: Progress) -> Iterator[PolicySource]:
    """The source that `settings` ask for; its engines are closed at the end.

    Raises:
        UsageError: neither a model nor a field is given, or both are; the model cannot read the corpus's text
            (`align` bytes).
        MismatchError: the model's tokenizer gives other ids than the corpus holds.
        PearError: the model cannot be loaded.
    """
    if (settings.model is None) == (settings.from_field is None):
        raise UsageError("give either --model M, or --from-field F for log-probs recorded at generation time")
    foreign = settings.align == "bytes"
    if settings.from_field is not None:
        if foreign:
            raise UsageError(
                "--align bytes goes with --model: recorded log-probs are of the corpus's own tokens"
            )
        yield recorded_source(settings.from_field, progress)
        return
    assert settings.model is not None
    model = resolve(settings.model)
    with open_scorer(settings, progress.say, progress.note) as scorer:
        # The engines load their model meanwhile.
        if foreign:
            text = foreign_text(store, model, settings)
        else:
            check = same_ids_check(store, model, settings.revision, settings.trust_remote_code)
        progress.say(scorer.ready().sentence)
        source = engine_source(scorer, settings.max_length, scorer.workers)
        source = replace(source, close=scorer.close)
        yield foreign_source(source, text) if foreign else replace(source, check_batch=check)
