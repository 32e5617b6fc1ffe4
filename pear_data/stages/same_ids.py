"""Both policies score the corpus's token ids, so a model whose tokenizer gives others is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pear_data.chat.tokenizers import load_tokenizer, same_ids, tokenizer_fingerprint
from pear_data.corpus.stored_tokenizer import FOLDER
from pear_data.errors import MismatchError
from pear_data.store import Store
from pear_data.tokens import TokenBatch

TEXTS_PER_BATCH = 4


def same_ids_check(
    store: Store, model: str, revision: str | None, trust_remote_code: bool
) -> Callable[[TokenBatch], None]:
    """A check to run on every batch before `model` scores it.

    The check compares what the ids in use stand for under both tokenizers, and how both split a few of the batch's
    texts; it raises MismatchError with the first difference. Tokenizers with one fingerprint need no check.

    Raises:
        PearError: the model has no tokenizer that can be loaded.
        MismatchError: the store's own tokenizer is damaged.
    """
    other = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    known = store.manifest.tokenizer
    if known is not None and known.fingerprint == tokenizer_fingerprint(other):
        return lambda batch: None
    for file in known.files if known is not None else ():
        store.file(file)
    initial = load_tokenizer(str(store.path / FOLDER), trust_remote_code=trust_remote_code)

    def check(batch: TokenBatch) -> None:
        first = [
            batch.input_ids[slice(*batch.offsets[row : row + 2])]
            for row in range(len(batch))[:TEXTS_PER_BATCH]
        ]
        texts = [initial.decode(ids, skip_special_tokens=False) for ids in first]
        reason = same_ids(initial, other, np.unique(batch.input_ids), texts)
        if reason:
            raise MismatchError(
                f"{model} cannot score this corpus: {reason}; compare both policies over bytes (--align bytes), take a "
                "model of the same tokenizer, or log-probs recorded at generation time (--from-field)"
            )

    return check
