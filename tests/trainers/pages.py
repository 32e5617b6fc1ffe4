"""The hooks' pages and README, as users copy from them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str = "") -> list[str]:
    """The code blocks of a language; of none, the export commands."""
    folder = _ROOT if page == "README" else _ROOT / "pear_data" / "hooks"
    text = (folder / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def words(block: str, cwd: Path | None = None) -> list[str]:
    """The words of a shell command, with file patterns expanded as the shell in `cwd` would."""
    found = []
    for word in shlex.split(block.replace("\\\n", " ")):
        files = sorted(str(path.relative_to(cwd)) for path in cwd.glob(word)) if cwd and "*" in word else []
        found.extend(files or [word])
    return found
