"""Encoding texts in which messages spell control tokens, so that only the template's own become such tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from pear_data.chat.boundaries import BoundaryEncoder, Encoded
from pear_data.chat.control_text import ControlText, Hidden, put_back
from pear_data.errors import SampleError

_MARK = "\U0010ffff"  # a noncharacter on both sides of the number that stands in for a control token


class PlainControlEncoder:
    """Encodes with a copy of a tokenizer that knows its control tokens under other names.

    In the text to encode the template's control tokens take those names and the hidden texts their own spelling,
    which is then plain text in its full context.
    """

    def __init__(self, tokenizer: Tokenizer, control: ControlText) -> None:
        self._control = control
        self._names = {token: f"{_MARK}{k}{_MARK}" for k, token in enumerate(sorted(control.tokens))}
        settings = json.loads(tokenizer.to_str())
        added = settings.pop("added_tokens")
        copy = Tokenizer.from_str(json.dumps({**settings, "added_tokens": []}))
        copy.add_tokens([self._renamed_token(token) for token in added])
        # A renamed token may get another id: this table leads back.
        self._ids = np.arange(max(copy.get_vocab().values()) + 1, dtype=np.int32)
        for token in added:
            self._ids[copy.token_to_id(self._name(token["content"]))] = token["id"]
        self._control_ids = [token["id"] for token in added if token["content"] in self._names]
        self._encoder = BoundaryEncoder(copy)

    def encode(self, text: str, boundaries: Sequence[int], hidden: Hidden) -> Encoded | SampleError:
        """Like `BoundaryEncoder.encode` for one text; SampleError where the tokenizer cannot keep texts plain."""
        parts = [text[a:b] for a, b in zip([0, *boundaries], [*boundaries, len(text)], strict=True)]
        count = sum(len(self._control.pattern.findall(part)) for part in parts)
        parts = [self._renamed(part, hidden) for part in parts]
        moved = np.cumsum([len(part) for part in parts])[:-1]
        (encoded,) = self._encoder.encode(["".join(parts)], [moved.tolist()])
        if isinstance(encoded, SampleError):
            return encoded
        ids = self._ids[encoded.ids]
        if np.isin(ids, self._control_ids).sum() != count:
            spelled = ", ".join(sorted(set(hidden.values())))
            return SampleError(f"the tokenizer cannot encode {spelled} as plain text")
        return Encoded(ids, encoded.positions, encoded.splits)

    def _renamed_token(self, token: dict[str, Any]) -> AddedToken:
        flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        return AddedToken(self._name(token["content"]), **flags)

    def _name(self, token: str) -> str:
        return self._names.get(token, token)

    def _renamed(self, text: str, hidden: Hidden) -> str:
        return put_back(self._control.pattern.sub(lambda match: self._name(match.group()), text), hidden)
