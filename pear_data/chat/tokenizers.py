"""Loading tokenizers, and telling whether two give the same ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pear_data.errors import PearError, UsageError

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub name.

    Raises PearError where it cannot be loaded, and UsageError where it has no fast backend: only that tells
    which characters each token covers.
    """
    path = Path(name_or_path)
    if not path.exists() and (path.is_absolute() or name_or_path.startswith((".", "~"))):
        raise PearError(f"no model folder at {name_or_path}: give a folder or a Hugging Face name")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
        if not tokenizer.is_fast:
            # With mistral_common installed, models that ship its format come as its own, slow backend.
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, mistral_format=False, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise PearError(
            f"cannot load the tokenizer of {name_or_path}: {reason} "
            "(give a model folder, or a Hugging Face name that is cached or reachable)"
        ) from error
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {name_or_path} ({type(tokenizer).__name__}) has no fast backend: "
            "put its tokenizer.json beside the model, or use a model that has one"
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the backend (vocabulary, merges, normalizer, added tokens...) and the special tokens by name."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):
        backend.pop(setting)
    settings = json.dumps([backend, tokenizer.special_tokens_map], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


def same_ids(
    initial: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    used_ids: npt.NDArray[np.integer],
    texts: Sequence[str],
) -> str | None:
    """None where `other` reads the ids in use as `initial` does and gives `texts` the same ids, else the reason."""
    ids = np.unique(used_ids).tolist()
    ours, theirs = ([t.backend_tokenizer.id_to_token(i) for i in ids] for t in (initial, other))
    for token_id, our, their in zip(ids, ours, theirs, strict=True):
        if our != their:
            named = f"is {their!r}" if their is not None else "does not exist"
            return f"id {token_id} is {our!r} in the corpus's tokenizer and {named} in the other"
    if not texts:
        return None
    first, second = (t(list(texts), add_special_tokens=False)["input_ids"] for t in (initial, other))
    for text, our_ids, their_ids in zip(texts, first, second, strict=True):
        if our_ids != their_ids:
            at = next((i for i, (a, b) in enumerate(zip(our_ids, their_ids, strict=False)) if a != b), None)
            at = min(len(our_ids), len(their_ids)) if at is None else at
            return (
                f"the other tokenizer splits {text[:40]!r} differently: {len(our_ids)} tokens against "
                f"{len(their_ids)}, the first difference at token {at}"
            )
    return None


def token_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Display text of each id, spaces kept; an id without a token is empty, half a character is U+FFFD."""
    vocabulary = tokenizer.get_vocab()
    pieces = [""] * (max(vocabulary.values()) + 1)
    for piece, token_id in vocabulary.items():
        pieces[token_id] = piece
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    plain = {token["id"] for token in settings["added_tokens"]}
    shown = _from_bytes() if '"ByteLevel"' in json.dumps(settings["decoder"]) else _from_sentence_piece
    return [piece if i in plain else shown(piece) for i, piece in enumerate(pieces)]


def _from_bytes() -> Callable[[str], str]:
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}

    def shown(piece: str) -> str:
        if not all(char in byte_of for char in piece):
            return piece
        return bytes(byte_of[char] for char in piece).decode(errors="replace")

    return shown


def _from_sentence_piece(piece: str) -> str:
    if BYTE_TOKEN.fullmatch(piece):
        return bytes([int(piece[3:5], 16)]).decode(errors="replace")
    return piece.replace("▁", " ")
