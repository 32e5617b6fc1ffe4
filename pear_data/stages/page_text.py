"""Text of any length brought to one that fits a page."""

from __future__ import annotations

# Characters of a name or an id; what is longer is cut and its length said.
NAME_CHARACTERS = 80


def shortened(text: str, characters: int) -> str:
    """`text`, or its first characters and how many there are of it."""
    return text if len(text) <= characters else f"{text[:characters]}… ({len(text):,} characters)"
