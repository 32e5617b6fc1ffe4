"""Every fault at full count, as a table: what was done to the job, how often, what was lost, how long it took.

    python tests/faults/campaign.py

The checks are those of the tests beside this file, which run fewer of them; one that fails ends the campaign.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from small_job import SAMPLES, STEPS, make_states, whole_states, write_corpus
from test_damage import KINDS, cut_everywhere, flip_bits
from test_disk_full import fill_up
from test_every_operation import fail_every, kill_every
from test_kill_loop import kill_over_and_over
from test_memory import peaks
from zygote import Zygote

HERE = Path(__file__).parent
Row = tuple[str, str, str, str]


def every_operation_fails(folder: Path) -> Row:
    states = make_states(folder / "states")
    runs = sum(fail_every(states, step, folder / f"of {step}") for step in STEPS)
    return "a write fails", "operation n raises ENOSPC, for every n of every step", f"{runs}", "nothing"


def killed_at_every_operation(folder: Path) -> Row:
    states = make_states(folder / "states")
    runs = sum(kill_every(states, step, folder / f"of {step}") for step in STEPS)
    return (
        "death at a write",
        "the disk as it is before operation n, for every n",
        f"{runs}",
        "shards in work",
    )


def killed_a_hundred_times(folder: Path) -> Row:
    ends, kept = kill_over_and_over(folder, 100, 60)
    runs = f"100 kills, {ends} jobs of 20 shards"
    return "kill -9", "SIGKILL at random moments", runs, f"shards in work; 0 of {kept:,} committed files seen"


def too_large_files(folder: Path) -> Row:
    with Zygote() as zygote:
        runs = fill_up(zygote, folder, 16)
    return "disk full", "RLIMIT_FSIZE a byte below a file's size", f"{runs}", "nothing"


def a_full_disk(folder: Path) -> Row:
    corpus = write_corpus(folder / "corpus", SAMPLES)
    place = folder / "place"
    place.mkdir()
    command = ["unshare", "-rm", sys.executable, str(HERE / "full_tmpfs.py"), str(corpus), str(place)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Operation not permitted" in result.stderr:
        return "disk full", "a tmpfs too small (not permitted here)", "0", "-"
    assert result.returncode == 0, result.stderr
    return "disk full", "a tmpfs of n * 16 kB, for every n", result.stdout.strip(), "nothing"


def files_cut(folder: Path) -> Row:
    done = whole_states(folder / "states")
    cuts = sum(cut_everywhere(shutil.copytree(done, folder / kind.replace("/", "-")), kind) for kind in KINDS)
    return (
        "a file cut short",
        f"at every 1/16 of {len(KINDS)} kinds of files",
        f"{cuts}",
        "nothing: made again",
    )


def bits_flipped(folder: Path) -> Row:
    refused = flip_bits(whole_states(folder / "states"), 200)
    runs = f"200, 200 found by verify, {refused} readers refused"
    return "bit rot", "one bit of one file, the manifest included", runs, "nothing unseen"


def memory_limited(folder: Path) -> Row:
    found = peaks(folder, 100)
    sizes = "; ".join(f"{step} {one:.0f} and {ten:.0f} MB" for step, one, ten, _ in found)
    return "memory", "RLIMIT_AS of a 1x run on a 10x corpus", f"{2 * len(found)}", f"nothing: {sizes}"


def tested(fault: str, how: str, lost: str, *files: str) -> Callable[[Path], Row]:
    """A row of what pytest runs."""

    def run(folder: Path) -> Row:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--basetemp={folder / 'tests'}",
        ]
        paths = [str(HERE / file) for file in files]
        result = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout
        return fault, how, re.findall(r"(\d+) passed", result.stdout)[-1], lost

    return run


CAMPAIGNS: dict[str, Callable[[Path], Row]] = {
    "fail": every_operation_fails,
    "die": killed_at_every_operation,
    "kill": killed_a_hundred_times,
    "size": too_large_files,
    "full": a_full_disk,
    "cut": files_cut,
    "flip": bits_flipped,
    "memory": memory_limited,
    "engine": tested(
        "engine death",
        "raises, exits, SIGKILL, out of memory, wrong length",
        "the sample at fault, quarantined",
        "test_engine_death.py",
        "../workers/test_workers.py",
    ),
    "values": tested(
        "bad values", "NaN, -inf, inf, ids twice, other tokenizer, too long", "nothing stored", "test_bad_values.py"
    ),
    "settings": tested(
        "settings changed", "each field of each step", "nothing: exit 4", "test_changed_settings.py"
    ),
    "writers": tested("two writers", "each command, while a lock is held", "nothing: exit 1", "test_two_writers.py"),
    "commands": tested(
        "kill -9, Ctrl-C", "of commands with a model, of weighting workers", "shards in work",
        "../workers/test_interrupted_scoring.py", "../workers/test_weighting_workers.py",
    ),
}  # fmt: skip


def rows(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name in names or CAMPAIGNS:
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            row = CAMPAIGNS[name](Path(folder))
            yield *row, f"{time.monotonic() - start:.0f}"


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(CAMPAIGNS)))
def main(names: tuple[str, ...]) -> None:
    print("| fault | how | runs | lost | seconds |\n|---|---|---|---|---|")
    for row in rows(names):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
