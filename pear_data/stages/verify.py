"""Checking a store: checksums, schemas, row alignment and sums of every artefact."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pear_data.errors import MismatchError
from pear_data.progress import Outcome, Progress
from pear_data.schema import CORPUS as CORPUS_SCHEMA
from pear_data.schema import FORMAT_VERSION, SCORES, STATUS_OK, WEIGHTS
from pear_data.stages.alignment import outdated_inputs
from pear_data.stages.verify_sums import corpus_summary_faults, totals_faults, weight_summary_faults
from pear_data.store import Store
from pear_data.store.columns import flat_values, list_lengths
from pear_data.store.manifest import CORPUS, Shard

_SCHEMAS = {"corpus": CORPUS_SCHEMA, "scores": SCORES, "weights": WEIGHTS}
_VALUES = {"scores": "logprobs", "weights": "weights"}


def verify(store: Store, progress: Progress) -> Outcome:
    """Check every committed file and every row's place.

    Raises:
        MismatchError: at least one fault; each was said through `progress`.
    """
    stages = store.manifest.stages
    files = store.manifest.files
    progress.begin("verify", len(files), "files")
    faulty: set[str] = set()
    for entry in files:
        fault = store.fault_of(entry)
        if fault:
            faulty.add(entry.path)
            progress.say(f"{store.path / entry.path} {fault}")
        progress.advance(1)
    # The rows of an earlier version's files are not those of the present schemas.
    present = store.manifest.format_version == FORMAT_VERSION
    misplaced = [
        fault
        for key, stage in (stages.items() if present else ())
        for shard in stage.shards
        if shard.file.path not in faulty
        for fault in list(_shard_faults(store, key, shard, faulty))
        or _beside_faults(store, key, shard, faulty)
    ]
    for fault in misplaced:
        progress.say(fault)
    progress.end()
    if faulty or misplaced:
        raise MismatchError(
            f"{store.path}: {len(faulty) + len(misplaced)} faults in {len(files)} files, listed above: "
            "run the commands that made them again (with --overwrite where settings changed); each redoes only what is "
            "damaged"
        )
    unfinished = [key for key, stage in stages.items() if not stage.complete]
    note = f"; not finished yet: {', '.join(unfinished)}" if unfinished else ""
    if not present:
        note += f"; format version {store.manifest.format_version}: rows are compared after `pear-data migrate` only"
    whole = "whole and aligned" if present else "whole"
    return Outcome(f"{store.path}: {len(files)} files in {len(stages)} stages are {whole}{note}")


def _shard_faults(store: Store, key: str, shard: Shard, faulty: set[str]) -> Iterator[str]:
    kind = key.partition("/")[0]
    where = store.path / shard.file.path
    rows = 0
    for table in store.row_groups(shard):
        if table.schema != _SCHEMAS[kind]:
            yield f"{where} has another schema than {kind} files have"
            return
        yield from (f"{where}: {fault}" for fault in _row_faults(kind, table))
        rows += len(table)
    if rows != shard.rows:
        yield f"{where} does not hold the {shard.rows} rows the manifest says"
    corpus_shard = store.stage(CORPUS).shard(shard.name)
    if kind == CORPUS or (corpus_shard is not None and corpus_shard.file.path in faulty):
        return
    outdated = outdated_inputs(store, shard)
    yield from (
        f"{where} was made from another shard of {source} than the present one" for source in outdated
    )
    if corpus_shard is None or CORPUS not in shard.inputs:
        yield f"{where} belongs to no shard of the corpus"
    elif CORPUS not in outdated and not _same_rows(store, shard, corpus_shard):
        yield f"{where}: rows are not those of {corpus_shard.file.path}"


def _same_rows(store: Store, shard: Shard, corpus_shard: Shard) -> bool:
    """Whether row groups hold the same samples in the same order."""
    groups = zip_longest(*(store.row_groups(entry, ["sample_id"]) for entry in (shard, corpus_shard)))
    return all(one is not None and other is not None and one.equals(other) for one, other in groups)


def _beside_faults(store: Store, key: str, shard: Shard, unusable: set[str]) -> Iterator[str]:
    """Faults of the files beside a part: its summary, which joins the `unusable` if it has any, and its totals."""
    summary = shard.summary
    if summary and summary.path not in unusable:
        check = corpus_summary_faults if key == CORPUS else weight_summary_faults
        faults = list(check(store, shard, summary))
        unusable.update(summary.path for _ in faults)
        yield from (f"{store.path / summary.path}: {fault}" for fault in faults)
    corpus = store.stage(CORPUS).shard(shard.name)
    if not (summary and shard.totals and corpus) or CORPUS in outdated_inputs(store, shard):
        return
    sources = corpus.summary or corpus.file
    if unusable.isdisjoint(file.path for file in (summary, shard.totals, sources)):
        faults = list(totals_faults(store, sources, summary, shard.totals))
        yield from (f"{store.path / shard.totals.path}: {fault}" for fault in faults)


def _row_faults(kind: str, table: pa.Table) -> Iterator[str]:
    num_scored = table["num_scored"].to_numpy()
    if kind == CORPUS:
        if not np.array_equal(list_lengths(table["input_ids"]), table["num_tokens"].to_numpy()):
            yield "num_tokens differs from the length of input_ids"
        if not np.array_equal(list_lengths(table["loss_mask"]), table["num_tokens"].to_numpy()):
            yield "num_tokens differs from the length of loss_mask"
        if int(flat_values(table["loss_mask"]).sum()) != int(num_scored.sum()):
            yield "num_scored differs from the loss_mask"
        return
    column = _VALUES[kind]
    present = pc.is_valid(table[column]).to_numpy(zero_copy_only=False)
    if not np.array_equal(list_lengths(table[column])[present], num_scored[present]):
        yield f"num_scored differs from the length of {column}"
    if not np.isfinite(flat_values(table[column])).all():
        yield f"{column} are not all finite"
    if kind == "scores" and not _spans_fit(table):
        yield "span_tokens do not sum to num_scored"
    ok = table["status"].to_numpy(zero_copy_only=False) == STATUS_OK
    if (ok & ~present).any():
        yield f"rows with status ok have no {column}"


def _spans_fit(table: pa.Table) -> bool:
    """Whether the spans of each row that has any are of at least a token each and together of its tokens."""
    spanned = table.filter(pc.is_valid(table["span_tokens"]))
    tokens, rows = flat_values(spanned["span_tokens"]), list_lengths(spanned["span_tokens"])
    if (tokens < 1).any() or (rows < 1).any():
        return False
    sums = np.add.reduceat(tokens, np.cumsum(rows) - rows, dtype=np.int64) if len(rows) else rows
    return np.array_equal(sums, spanned["num_scored"].to_numpy())
