"""The bundled demo: a number game with a verifier, two tiny trained policies, and solutions one of them wrote.

`python -m pear_data.demo.train` makes every asset again from nothing.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

_PATH_OF = {"corpus": "corpus.jsonl.gz", "initial": "initial", "behavior": "behavior"}


def asset(name: Literal["corpus", "initial", "behavior"]) -> Path:
    """Where a bundled asset lies: the corpus file, or the directory of the initial or the behavior policy.

    Raises KeyError for any other name.
    """
    return Path(str(resources.files(__name__) / "assets")) / _PATH_OF[name]
