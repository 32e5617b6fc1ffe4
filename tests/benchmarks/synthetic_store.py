"""A scored store of any size, made of random numbers: what `ingest` and two `score`s leave, without a model.

    python tests/benchmarks/synthetic_store.py DIR --tokens 40000000

Lengths are lognormal; a fifth of the tokens are prompt. A policy's log-probs are random, and the log-ratio of two of
them grows with the token's surprise, so that about as many bits of a float32 repeat as in real ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_data.schema import (
    CORPUS,
    CORPUS_SUMMARY,
    FLOATS,
    INPUT_IDS,
    INT32S,
    LOSS_MASK,
    SCORES,
    STATUS_OK,
    VOCABULARY,
)
from pear_data.store import Store, writable_store
from pear_data.store.columns import list_column, offsets_of
from pear_data.store.manifest import FileEntry, Shard, TokenizerEntry
from pear_data.store.shards import parquet_shard, summary_path, summary_shard

VOCABULARY_SIZE = 32_000
GROUP_TOKENS = 1_000_000
SPREAD = 1.0  # standard deviation of the log of a length
PROMPT = 0.2  # share of a sample's tokens
DISTURBANCE = 0.25  # standard deviation of the log of one policy's surprise at a token over another's
CONFIDENCE = np.float32(0.93)  # of the second policy: so weights spread, with 7 % at a bound
LONGEST_SPAN = 3  # tokens on which two tokenizers agree, at most

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one row group: the number of the first, and the tokens of each."""

    seed: int
    first: int
    lengths: Counts  # [n] prompt included
    scored: Counts  # [n]


def make_store(
    folder: Path,
    tokens: int,
    *,
    seed: int = 0,
    mean_tokens: int = 1500,
    longest: int = 16_384,
    shard_tokens: int = 4_000_000,
    sources: int = 5,
    policies: Sequence[str] = ("initial", "behavior"),
    spans: bool = False,
) -> None:
    """Write a store of at least `tokens` scored tokens into `folder`, new or empty; memory of a row group.

    Args:
        folder: where.
        tokens: scored tokens of all samples together.
        seed: of the random numbers.
        mean_tokens: mean length of a sample, prompt included, before `longest` cuts.
        longest: tokens of the longest sample.
        shard_tokens: tokens per shard, prompts included.
        sources: sources that the samples come from, about as many from each.
        policies: names of the policies; the second one's log-ratios to the first are those of a near teacher.
        spans: whether all policies but the first read the text with another tokenizer (`--align bytes`).
    """
    with writable_store(folder, create=True) as store:
        store.manifest.tokenizer = _tokenizer(store)
        corpus = store.begin("corpus", {"made": "of random numbers", "seed": seed})
        for number, policy in enumerate(policies):
            aligned = {"align": "bytes"} if spans and number else {}
            inputs = {"inputs": {"corpus": corpus.fingerprint}}
            store.begin(f"scores/{policy}", {"model": f"random {number}", **aligned, **inputs})
        groups = _groups(seed, tokens, mean_tokens, longest)
        for number, shard in enumerate(_shards(groups, shard_tokens)):
            _write_shard(store, f"part-{number:05d}", shard, sources, policies, spans)
        for stage in store.manifest.stages.values():
            stage.complete = True
        store.save()


def _groups(seed: int, tokens: int, mean_tokens: int, longest: int) -> Iterator[Group]:
    random = np.random.default_rng(seed)
    first = made = 0
    at_once = math.ceil(GROUP_TOKENS / mean_tokens)
    while made < tokens:
        drawn = random.lognormal(math.log(mean_tokens) - SPREAD**2 / 2, SPREAD, at_once)
        lengths = np.clip(drawn, 2, longest).astype(np.int64)
        prompt = np.clip(lengths * random.uniform(PROMPT / 2, PROMPT * 1.5, at_once), 1, None).astype(
            np.int64
        )
        scored = lengths - prompt
        needed = int(np.searchsorted(np.cumsum(scored), tokens - made)) + 1
        yield Group(seed, first, lengths[:needed], scored[:needed])
        first += len(lengths[:needed])
        made += int(scored[:needed].sum())


def _shards(groups: Iterator[Group], shard_tokens: int) -> Iterator[list[Group]]:
    gathered: list[Group] = []
    tokens = 0
    for group in groups:
        gathered.append(group)
        tokens += int(group.lengths.sum())
        if tokens >= shard_tokens:
            yield gathered
            gathered, tokens = [], 0
    if gathered:
        yield gathered


def _write_shard(
    store: Store,
    name: str,
    groups: list[Group],
    sources: int,
    policies: Sequence[str],
    spans: bool,
) -> None:
    parts = {
        key: store.path / key / f"{name}.parquet" for key in ("corpus", *(f"scores/{p}" for p in policies))
    }
    summary = summary_path(store.path, "corpus", name)
    corpus, *scores = (
        parquet_shard(path, CORPUS if key == "corpus" else SCORES) for key, path in parts.items()
    )
    with corpus as corpus_writer, summary_shard(summary, CORPUS_SUMMARY) as summary_writer:
        for group in groups:
            rows = _corpus_rows(group, sources)
            corpus_writer.write(rows)
            summary_writer.add(rows.select(CORPUS_SUMMARY.names))
    for number, opened in enumerate(scores):
        with opened as writer:
            for group in groups:
                writer.write(_score_rows(group, number, spans))
    scored = sum(int(group.scored.sum()) for group in groups)
    inputs: dict[str, str] = {}
    for key, path in parts.items():
        is_corpus = key == "corpus"
        entry = Shard(
            name=name,
            file=store.entry_of(path),
            summary=store.entry_of(summary) if is_corpus else None,
            rows=sum(len(group.lengths) for group in groups),
            num_tokens=sum(int(group.lengths.sum()) for group in groups) if is_corpus else scored,
            num_scored=scored,
            inputs=inputs,
        )
        store.commit(key, entry)
        inputs = inputs or {key: entry.file.sha256}


def _sample_ids(group: Group) -> pa.Array:
    numbers = pa.array(np.arange(group.first, group.first + len(group.lengths)))
    return pc.binary_join_element_wise("s", pc.utf8_lpad(numbers.cast(pa.string()), 9, "0"), "")


def _corpus_rows(group: Group, sources: int) -> pa.Table:
    random = np.random.default_rng((group.seed, group.first, 0))
    lengths = group.lengths
    ids = _sample_ids(group)
    total = int(lengths.sum())
    in_sample = np.arange(total) - np.repeat(offsets_of(lengths)[:-1], lengths)
    mask = in_sample >= np.repeat(lengths - group.scored, lengths)
    # Frequent tokens first, as in vocabularies of byte pairs.
    token_ids = (VOCABULARY_SIZE * random.random(total, dtype=np.float32) ** 3).astype(np.int32)
    names = pa.array([f"source-{number}" for number in range(sources)])
    columns = [
        ids,
        names.take(pa.array(random.integers(0, sources, len(lengths)))),
        pa.array(np.ones(len(lengths), dtype=np.int8)),
        list_column(token_ids, lengths, INPUT_IDS),
        list_column(mask, lengths, LOSS_MASK),
        pa.array(lengths, pa.int32()),
        pa.array(group.scored, pa.int32()),
        pc.binary_join_element_wise('{"id": "', ids, '"}', ""),
    ]
    return pa.table(columns, schema=CORPUS)


def _score_rows(group: Group, number: int, spans: bool) -> pa.Table:
    """Log-probs of policy `number`: those of policy 0, disturbed."""
    scored, total = group.scored, int(group.scored.sum())
    surprise = np.random.default_rng((group.seed, group.first, 1)).standard_normal(total, dtype=np.float32)
    logprobs = -np.exp(surprise - np.float32(1.5))
    random = np.random.default_rng((group.seed, group.first, 1 + number))
    if number:
        logprobs *= CONFIDENCE * np.exp(
            np.float32(DISTURBANCE) * random.standard_normal(total, dtype=np.float32)
        )
    rows = len(scored)
    columns = [
        _sample_ids(group),
        list_column(logprobs, scored, FLOATS),
        _span_tokens(scored, random) if spans and number else pa.nulls(rows, INT32S),
        pa.array(scored, pa.int32()),
        pa.array(np.add.reduceat(logprobs, offsets_of(scored)[:-1], dtype=np.float64)),
        pa.array([STATUS_OK]).take(pa.array(np.zeros(rows, dtype=np.int32))),
    ]
    return pa.table(columns, schema=SCORES)


def _span_tokens(scored: Counts, random: np.random.Generator) -> pa.ListArray:
    """Spans of 1 to LONGEST_SPAN tokens that end where samples end."""
    total = int(scored.sum())
    drawn = np.cumsum(random.integers(1, LONGEST_SPAN + 1, total))
    ends = np.union1d(drawn[drawn < total], np.cumsum(scored))
    per_sample = np.diff(np.searchsorted(ends, np.cumsum(scored), side="right"), prepend=0)
    return list_column(np.diff(ends, prepend=0).astype(np.int32), per_sample, INT32S)


def _tokenizer(store: Store) -> TokenizerEntry:
    path = store.path / "tokenizer" / "vocabulary.parquet"
    path.parent.mkdir()
    tokens = [f" t{number}" for number in range(VOCABULARY_SIZE)]
    pq.write_table(pa.table([range(VOCABULARY_SIZE), tokens], schema=VOCABULARY), path)
    entry: FileEntry = store.entry_of(path)
    made: dict[str, Any] = {"name": "random", "fingerprint": "", "template_fingerprint": "", "files": []}
    return TokenizerEntry(**made, vocabulary=entry)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--tokens", default=40_000_000, show_default=True, help="Scored tokens.")
@click.option("--seed", default=0, show_default=True)
@click.option("--mean-tokens", default=1500, show_default=True, help="Mean length, prompt included.")
@click.option("--longest", default=16_384, show_default=True, help="Greatest length.")
@click.option("--shard-tokens", default=4_000_000, show_default=True)
@click.option("--sources", default=5, show_default=True)
@click.option("--spans", is_flag=True, help="The behavior policy has another tokenizer (--align bytes).")
def main(folder: Path, **options: Any) -> None:
    make_store(folder, **options)


if __name__ == "__main__":
    main()
