"""Text from a corpus made safe to show: nothing in it steers a terminal or hides what it says."""

from __future__ import annotations

# C0 and C1 controls but newline and tab, and the marks that reorder or hide text (bidi overrides, zero widths).
_UNSAFE = [
    *range(0x20),
    *range(0x7F, 0xA0),
    *range(0x200B, 0x2010),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2070),
]
_STRIPPED = dict.fromkeys([code for code in (*_UNSAFE, 0xFEFF) if chr(code) not in "\n\t"])
_ONE_LINE = {**_STRIPPED, ord("\n"): "⏎", ord("\t"): "→"}


def printable(text: str) -> str:
    """`text` without control characters; newlines and tabs stay."""
    return text.translate(_STRIPPED)


def one_line(text: str) -> str:
    """`text` without control characters, newlines shown as ⏎ and tabs as →."""
    return text.translate(_ONE_LINE)


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
