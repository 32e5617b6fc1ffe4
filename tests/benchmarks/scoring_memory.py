"""Peak memory of `pear-data score` on a corpus and on one ten times as long.

    python tests/benchmarks/scoring_memory.py

The corpus is the bundled one with a number before each prompt, scored by the bundled initial policy; shards of 50,000
tokens, so that even the short corpus has several.
"""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import psutil
from rich.console import Console
from rich.table import Table

from pear_data.resources import resolve

SHARD_TOKENS = 50_000
PAUSE = 0.02  # seconds between two looks


def write_corpus(path: Path, samples: int) -> None:
    lines = gzip.decompress(Path(resolve("bundled:corpus")).read_bytes()).splitlines()
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(itertools.islice(itertools.cycle(lines), samples)):
            row = json.loads(line)
            row["id"] = f"s{number}"
            row["messages"][0]["content"] = f"{number}. {row['messages'][0]['content']}"
            file.write(json.dumps(row) + "\n")


def peaks(arguments: list[str]) -> tuple[float, int, int]:
    """Seconds, and the largest resident sizes (bytes) of the command's own process and of all it started."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "pear_data", *arguments], stderr=subprocess.DEVNULL)
    own = children = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            own = max(own, watched.memory_info().rss)
            children = max(
                children, sum(child.memory_info().rss for child in watched.children(recursive=True))
            )
        except psutil.NoSuchProcess:
            pass
        time.sleep(PAUSE)
    if process.returncode:
        raise SystemExit(f"pear-data {' '.join(arguments)} failed with {process.returncode}")
    return time.perf_counter() - start, own, children


@click.command(help=__doc__)
@click.option("--samples", default=3000, show_default=True, help="Samples of the short corpus.")
def main(samples: int) -> None:
    table = Table()
    for heading in ("corpus", "samples", "seconds", "command MiB", "engine MiB"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as scratch:
        for factor in (1, 10):
            corpus, store = Path(scratch, f"{factor}.jsonl"), Path(scratch, f"store{factor}")
            write_corpus(corpus, samples * factor)
            model = ["--model", "bundled:initial", "--engine", "transformers"]
            rest = ["--shard-tokens", str(SHARD_TOKENS), "--store", str(store)]
            seconds, own, children = peaks(["score", str(corpus), *model, *rest])
            table.add_row(
                f"{factor}x",
                f"{samples * factor:,}",
                f"{seconds:.0f}",
                f"{own >> 20:,}",
                f"{children >> 20:,}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
