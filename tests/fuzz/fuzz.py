"""Coverage-guided fuzzing of a reader with atheris, which is no requirement of anything else.

    pip install atheris
    python tests/fuzz/fuzz.py parquet -max_total_time=300

What it finds new it keeps in a folder beside the corpus (`tests/fuzz/found/TARGET`), which git ignores; a fault is
written to the working directory as `crash-...`. A file worth keeping goes to `tests/fuzz/corpus/TARGET`, where the
suite tries it from then on. Further options are libFuzzer's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

with atheris.instrument_imports(include=["pear_data", "targets", "json", "yaml"]):
    from targets import TARGETS


def main() -> None:
    name, *options = sys.argv[1:]
    found = HERE / "found" / name
    found.mkdir(parents=True, exist_ok=True)
    folders = [str(found), str(HERE / "corpus" / name)]
    atheris.Setup([sys.argv[0], *options, *folders], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
