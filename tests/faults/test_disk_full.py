"""A disk that takes no more: files that may not grow beyond a size, and every kind of file meets that size once."""

from __future__ import annotations

import re
import shutil

import pytest
from small_job import SAMPLES, STORE, assert_sound, content, write_corpus
from zygote import Zygote

LIMITS = 8


@pytest.fixture
def zygote():
    with Zygote() as opened:
        yield opened


def fill_up(zygote, folder, limits):
    """Run the job under so many limits, a byte less than the size of one of its files each; how often it failed."""
    corpus = write_corpus(folder / "corpus", SAMPLES)
    whole = shutil.copytree(corpus, folder / "whole")
    assert zygote.run(whole)["status"] == 0
    wanted = content(whole)
    # The manifest's is the largest but for the corpus's own and the tokenizer's.
    sizes = sorted({len(written) for name, written in wanted.items() if name != "corpus.jsonl"})
    chosen = [sizes[index * (len(sizes) - 1) // (limits - 1)] for index in range(limits)]
    chosen[-2] = len(wanted["store/manifest.json"])
    for size in chosen:
        work = shutil.copytree(corpus, folder / "work")
        ended = zygote.run(work, limits={"RLIMIT_FSIZE": size - 1})
        assert ended["status"] == 1, ended
        assert ended["message"].startswith(f"cannot write {work}/")
        assert "File too large" in ended["message"]
        assert "free space or" in ended["message"]
        assert not [path for path in work.rglob("*") if path.suffix == ".tmp"]
        assert_sound(work)
        assert zygote.run(work)["status"] == 0
        assert content(work) == wanted
        shutil.rmtree(work)
    return len(chosen)


def test_too_few_open_files_are_said_to_be_what_they_are(zygote, tmp_path):
    """What could not be read is not said to be what could not be written, nor to be damaged."""
    scored = write_corpus(tmp_path / "scored", SAMPLES)
    assert zygote.run(scored, ["ingest", "score initial", "score behavior"])["status"] == 0
    read, written = set(), set()
    for limit in range(6, 40):
        work = shutil.copytree(scored, tmp_path / str(limit))
        ended = zygote.run(work, ["weight"], limits={"RLIMIT_NOFILE": limit})
        if ended["status"] == 0:
            break
        if ended["status"] == -1:  # not at the store's files: the command line says what it is
            assert ended["message"] == "OSError(24, 'Too many open files')"
            continue
        said = re.fullmatch(
            rf"cannot (read|write) {work}/{STORE}/(\S+): Too many open files; raise the limit with `ulimit -n`.*",
            ended["message"],
        )
        (read if said[1] == "read" else written).add(said[2].rpartition("/")[0])
        assert_sound(work)
    assert "scores/initial" in read
    assert written <= {"", "weights/block", "summary/weights/block"}


def test_no_file_may_grow_beyond_a_size(zygote, tmp_path):
    fill_up(zygote, tmp_path, LIMITS)
