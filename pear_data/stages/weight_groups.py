"""Reading what one shard's weights are made of: a row group of both policies at a time, checked meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pear_data.errors import MismatchError
from pear_data.stages.weight_job import WeightJob
from pear_data.store import Store
from pear_data.store.columns import read_columns
from pear_data.store.manifest import FileEntry
from pear_data.store.reading import reading

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Group:
    """One row group of both policies, and its rows of the corpus."""

    samples: pa.Table  # sample_id, source (a code), label
    target: pa.Table
    behavior: pa.Table | None
    text: pa.Table | None  # input_ids and loss_mask


def open_groups(job: WeightJob) -> tuple[list[str], Generator[Group, None, None]]:
    """The sources of a shard, by code, and its row groups, each read while the one before is in use."""
    corpus = read_columns(job.root / job.corpus_summary.path, ["sample_id", "source", "label"])
    named = corpus["source"].combine_chunks().dictionary_encode()
    return named.dictionary.to_pylist(), _groups(job, corpus.set_column(1, "source", named.indices))


@contextlib.contextmanager
def checked(store: Store, job: WeightJob) -> Iterator[Callable[[], None]]:
    """Compare every file that is read with its sha256, beside the reading; call what this yields to have the result.

    Raises MismatchError, also where a damaged file cannot be read.
    """
    with ThreadPoolExecutor(1) as thread:
        checks = [thread.submit(store.file, entry) for entry in job.files]

        def check() -> None:
            for done in checks:
                done.result()

        try:
            yield check
        except Exception:
            check()  # what cannot be read or does not fit is damaged, if anything is
            raise


def _groups(job: WeightJob, samples: pa.Table) -> Generator[Group, None, None]:
    wanted = ["sample_id", "logprobs", "span_tokens", "num_scored", "status"]
    files: dict[str, tuple[FileEntry, list[str]]] = {"target": (job.target.file, wanted)}
    if job.behavior is not None:
        files["behavior"] = (job.behavior.file, wanted)
    if job.needs_text:
        files["text"] = (job.corpus.file, ["sample_id", "input_ids", "loss_mask"])
    first = 0
    with _one_ahead(_in_step(job, files)) as groups:
        for tables in groups:
            rows = samples.slice(first, len(tables["target"]))
            first += len(rows)
            if any(not table["sample_id"].equals(rows["sample_id"]) for table in tables.values()):
                raise MismatchError(f"{job.name}: the stages differ in their rows: run `pear-data verify`")
            yield Group(rows, tables["target"], tables.get("behavior"), tables.get("text"))
    if first != len(samples):
        raise MismatchError(f"{job.name}: the stages differ in their rows: run `pear-data verify`")


def _in_step(job: WeightJob, files: dict[str, tuple[FileEntry, list[str]]]) -> Iterator[dict[str, pa.Table]]:
    """The row groups of several files, the first of each together, then the second."""
    with contextlib.ExitStack() as stack:
        readers = {}
        for role, (entry, columns) in files.items():
            with reading(job.root / entry.path):
                parquet = pq.ParquetFile(job.root / entry.path, pre_buffer=False)
            readers[role] = (stack.enter_context(parquet), columns)
        counts = {parquet.num_row_groups for parquet, _ in readers.values()}
        if len(counts) > 1:
            raise MismatchError(f"{job.name}: stages differ in row groups: run `pear-data verify`")
        for index in range(counts.pop()):
            tables = {}
            for role, (parquet, columns) in readers.items():
                with reading(job.root / files[role][0].path):
                    tables[role] = parquet.read_row_group(index, columns=columns, use_threads=False)
            yield tables


@contextlib.contextmanager
def _one_ahead(items: Iterator[Item]) -> Iterator[Iterator[Item]]:
    """The same, each made in another thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:

        def made() -> Iterator[Item]:
            following = thread.submit(next, items, None)
            while (item := following.result()) is not None:
                following = thread.submit(next, items, None)
                yield item

        yield made()
