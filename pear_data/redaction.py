"""Secrets taken out of text that leaves: what is stored, logged, shown or reported.

What is taken for a secret: who logs in, in an address; what a query of an address names token, key or signature;
tokens of known make; values given for a password or a token; and whatever HF_TOKEN and variables of like names hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_WORD = r"(?<![\w-])[\w-]{0,64}"  # bounded: the text may be anything
_SECRET = (
    rf"(?:{_WORD}(?:secret|passw(?:or)?d|api[_-]?key|access[_-]?key|credentials?)"
    r"|(?:hf|auth|access|bearer)[_-]?token)"
)
_QUERIED = rf"(?:{_WORD}(?:token|secret|passw(?:or)?d|key|credential|signature)|sig|auth|pw)"
_VALUE = rf"(?!{re.escape(HIDDEN)})[^\s&#\"'<>,;(){{}}\[\]]+"
_IN_QUERY = _VALUE.replace(r"\s", r"\s:")  # a line number may follow
_OF_URL = r"[^\s/?#\"'<>@]"
_PATTERNS = (
    (re.compile(rf"(?<=://){_OF_URL}+(?:@{_OF_URL}*)*(?=@)"), HIDDEN),
    (re.compile(rf"([?&]{_QUERIED}=){_IN_QUERY}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"({_SECRET}=){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    # As YAML or JSON has it; in a sentence a colon is followed by anything.
    (re.compile(rf"([{{,]\s*[\"']?{_SECRET}[\"']?\s*:\s*[\"']?){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Bearer\s+)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf_|api_org_|gh[pousr]_|glpat-)[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"), HIDDEN),
    (re.compile(r"\bsk-(?=[\w-]*\d)[\w-]{20,}"), HIDDEN),
)
_SECRET_NAME = re.compile(rf"{_SECRET}|token", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"(?:\A|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)\Z", re.IGNORECASE
)
_SHORTEST = 8  # of a variable's value: less would be found in innocent words


def redacted(text: str) -> str:
    """`text` with *** for each secret in it."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def redacted_values(values: dict[str, Any]) -> dict[str, Any]:
    """A mapping as of JSON with `redacted` strings in it, names among them."""
    return {redacted(name): _redacted(value) for name, value in values.items()}


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return redacted_values(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_redacted, value))
    return value


def secret_in(name: str, value: Any) -> str | None:
    """Where a setting holds a secret: its own name or one inside it, dotted; None where it holds none."""
    if isinstance(value, Mapping):
        inside = (secret_in(f"{name}.{key}", each) for key, each in value.items())
        return next((found for found in inside if found), None)
    if isinstance(value, list | tuple):
        return next((found for found in (secret_in(name, each) for each in value) if found), None)
    named = isinstance(value, str) and value and _SECRET_NAME.fullmatch(name.rpartition(".")[2])
    return name if named or (isinstance(value, str) and redacted(value) != value) else None
