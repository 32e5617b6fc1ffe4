"""The tokenizer that made a corpus, kept in its store with the text of every id."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pear_data.chat.tokenizers import token_strings
from pear_data.errors import PearError
from pear_data.redaction import redacted
from pear_data.schema import VOCABULARY
from pear_data.store import Store
from pear_data.store.commit import TEMP_SUFFIX, atomic_path, operation
from pear_data.store.manifest import FileEntry, TokenizerEntry
from pear_data.store.private import private_folder
from pear_data.store.shards import parquet_shard

FOLDER = "tokenizer"


def store_tokenizer(
    store: Store, tokenizer: PreTrainedTokenizerBase, name: str, fingerprint: str, template_fingerprint: str
) -> None:
    """Put a tokenizer's files and vocabulary into the store and its manifest, unless they are there, whole.

    Raises:
        PearError: the disk refused.
    """
    entry = store.manifest.tokenizer
    if (
        entry is not None
        and (entry.fingerprint, entry.template_fingerprint) == (fingerprint, template_fingerprint)
        and not any(store.fault_of(file) for file in [*entry.files, entry.vocabulary])
    ):
        return
    store.manifest.tokenizer = TokenizerEntry(
        name=redacted(name),
        fingerprint=fingerprint,
        template_fingerprint=template_fingerprint,
        files=_save_files(store, tokenizer),
        vocabulary=_save_vocabulary(store, tokenizer),
    )
    store.save()


def _save_files(store: Store, tokenizer: PreTrainedTokenizerBase) -> list[FileEntry]:
    staging = store.path / f"{FOLDER}{TEMP_SUFFIX}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        try:
            with operation("write", staging):
                private_folder(staging)
                tokenizer.save_pretrained(staging)
        except PearError:
            raise
        # What the tokenizers library cannot write, it reports as a bare Exception.
        except Exception as error:
            raise PearError(
                f"cannot write {staging}: {error}; free space or use another --store, then run the same command again"
            ) from error
        saved = sorted(path for path in staging.rglob("*") if path.is_file())
        return [_publish(store, path, store.path / FOLDER / path.relative_to(staging)) for path in saved]
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(store: Store, saved: Path, final: Path) -> FileEntry:
    with atomic_path(final) as temporary, operation("write", final):
        shutil.copyfile(saved, temporary)
    return store.entry_of(final)


def _save_vocabulary(store: Store, tokenizer: PreTrainedTokenizerBase) -> FileEntry:
    strings = token_strings(tokenizer)
    final = store.path / FOLDER / "vocabulary.parquet"
    with parquet_shard(final, VOCABULARY) as writer:
        ids = pa.array(np.arange(len(strings), dtype=np.int32))
        writer.write(pa.table([ids, pa.array(strings, pa.string())], schema=VOCABULARY))
    return store.entry_of(final)
