"""A disk that takes no more: files that may not grow beyond a size, and every kind of file meets that size once."""

from __future__ import annotations

import shutil

import pytest
from small_job import SAMPLES, assert_sound, content, write_corpus
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


def test_no_file_may_grow_beyond_a_size(zygote, tmp_path):
    fill_up(zygote, tmp_path, LIMITS)
