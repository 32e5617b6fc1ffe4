"""The whole job on a real file system of so many bytes: it fills, the job says so, and with more room it goes on.

    unshare -rm python tests/faults/full_tmpfs.py CORPUS_FOLDER PLACE

prints how many sizes were too small. It mounts on PLACE, which only a mount namespace of its own should see.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from small_job import CORPUS, assert_sound, content, whole_job

from pear_data.errors import PearError

STEP = 16 << 10
ENOUGH = 64 << 20


def mount(place: Path, size: int, *options: str) -> None:
    arguments = ["mount", *options, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if options:
        arguments = ["mount", "-o", f"remount,size={size}", str(place)]
    subprocess.run(arguments, check=True)


def fill(corpus: Path, place: Path) -> int:
    """Let the disk be 16 kB larger each time until the job runs through; how often it did not."""
    mount(place, ENOUGH)
    shutil.copy(corpus / CORPUS, place)
    whole_job(place)
    wanted = content(place)
    subprocess.run(["umount", str(place)], check=True)
    failed, size = 0, (corpus / CORPUS).stat().st_size + STEP
    while True:
        mount(place, size)
        shutil.copy(corpus / CORPUS, place)
        refusal = refused(place)
        if not refusal:
            return failed
        assert refusal.startswith(f"cannot write {place}/"), refusal
        assert "No space left on device" in refusal, refusal
        assert not [path for path in place.rglob("*") if path.suffix == ".tmp"]
        assert_sound(place)
        mount(place, ENOUGH, "remount")
        whole_job(place)
        assert content(place) == wanted
        subprocess.run(["umount", str(place)], check=True)
        failed, size = failed + 1, size + STEP


def refused(place: Path) -> str:
    """Why the job cannot be done; nothing where it can."""
    try:
        whole_job(place)
    except PearError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print(fill(Path(sys.argv[1]), Path(sys.argv[2])))
