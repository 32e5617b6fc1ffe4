"""Peak memory does not grow with the corpus: a process limited to what a corpus takes bears ten times as much."""

from __future__ import annotations

from small_job import WITHOUT_A_MODEL, write_corpus
from zygote import Zygote

SAMPLES, PROMPT, SHARD_TOKENS = 40, 2000, 20_000
SLACK = 24 << 20


def peaks(folder, samples=SAMPLES):
    """(step, MB of resident memory at 1x, at 10x, MB of address space that both had) of each step."""
    found = []
    with Zygote() as zygote:
        small = write_corpus(folder / "1x", samples, PROMPT)
        large = write_corpus(folder / "10x", 10 * samples, PROMPT)
        for step in WITHOUT_A_MODEL:
            free = zygote.run(small, [step], shard_tokens=SHARD_TOKENS)
            assert free["status"] == 0, free
            limit = free["peak_as"] + SLACK
            limited = zygote.run(large, [step], shard_tokens=SHARD_TOKENS, limits={"RLIMIT_AS": limit})
            assert limited["status"] == 0, limited
            assert limited["peak_rss"] < free["peak_rss"] + SLACK
            found.append((step, free["peak_rss"] / 1e6, limited["peak_rss"] / 1e6, limit / 1e6))
    return found


def test_ten_times_the_corpus_takes_the_same_memory(tmp_path):
    for line in peaks(tmp_path):
        print("{}: {:.0f} MB, ten times as much: {:.0f} MB, both within {:.0f} MB of addresses".format(*line))
