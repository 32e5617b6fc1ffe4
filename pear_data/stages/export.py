"""Weighted datasets for external trainers; the canonical `hf` format.

A dataset is written beside its place and renamed into it when whole, so what stands at OUT is always complete.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pear_data import __version__
from pear_data.config import ExportSettings
from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.progress import Outcome, Progress
from pear_data.schema import EXPORT_HF, FLOATS, INPUT_IDS, STATUS_OK
from pear_data.stages.alignment import AlignedShard, aligned_row_groups, aligned_shards
from pear_data.store import Store
from pear_data.store.columns import flat_values, list_column, list_lengths
from pear_data.store.commit import write_atomically
from pear_data.store.lock import LOCK_NAME, exclusive
from pear_data.store.manifest import CORPUS, differing_fields
from pear_data.store.shards import parquet_shard, write_group

EXPORT_MANIFEST = "pear_export.json"
IGNORED_LABEL = -100
PARTIAL_SUFFIX = ".pear_export"


class ExportManifest(BaseModel):
    """`OUT/pear_export.json`: what a trainer must know to use the weights rightly."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["hf"]
    created_by: str
    alignment: str = Field(
        default="loss_weights[t] multiplies -log p(input_ids[t] | input_ids[<t]): unshifted, at the index of the "
        "label; 0 where not scored, so index 0 is 0",
        description="Which token a weight multiplies.",
    )
    normaliser: str = Field(
        default="sum(loss_weights * nll) / count(labels != -100)",
        description="The loss these weights are made for.",
    )
    tokenizer: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    weighting: str = Field(description="Name of the weighting in the store.")
    weighting_settings: dict[str, Any]
    weights_sha256: list[str] = Field(description="Checksums of the weight shards this was made from.")
    samples: int
    num_tokens: int
    num_scored: int
    mean_weight: float = Field(description="Mean over scored tokens.")
    left_out: dict[str, int] = Field(description="Samples not exported, by status.")


@dataclass(slots=True)
class _Totals:
    samples: int = 0
    num_tokens: int = 0
    num_scored: int = 0
    weight_sum: float = 0.0
    left_out: Counter[str] = field(default_factory=Counter)


def export(store: Store, settings: ExportSettings, progress: Progress) -> Outcome:
    """Write a weighted dataset to a new directory; samples whose weights have another status than ok stay out.

    Raises:
        UsageError: the weighting is missing or unfinished, or OUT holds something else.
        MismatchError: OUT holds an export of other weights; names the fields that differ.
    """
    key = f"weights/{settings.weights}"
    shards = aligned_shards(store, [key])
    out = Path(settings.out)
    if _already_exported(store, settings, shards, out):
        return Outcome(f"{out}: already holds this export; nothing to do")
    with _whole_folder(out) as partial:
        totals = _write_shards(store, key, shards, partial, f"export {out}", progress)
        if not totals.samples:
            raise UsageError(
                f"{key} has no sample with status ok, so there is nothing to export: see `pear-data stats`"
            )
        manifest = _manifest(store, settings, shards, totals)
        write_atomically(partial / EXPORT_MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    left_out = ", ".join(f"{count:,} {status}" for status, count in sorted(totals.left_out.items()))
    return Outcome(
        f"{out}: {totals.samples:,} samples, {totals.num_scored:,} weighted tokens, "
        f"mean weight {manifest.mean_weight:.4f}" + (f"; left out: {left_out}" if left_out else "")
    )


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`; it becomes `out` when the block ends well and vanishes when it does not.

    Raises:
        PearError: another process is filling it, or the disk refused.
    """
    partial = out.absolute().with_name(f".{out.absolute().name}{PARTIAL_SUFFIX}")
    with exclusive(partial):
        for leftover in partial.iterdir():
            if leftover.name != LOCK_NAME:
                leftover.unlink()
        try:
            yield partial
            (partial / LOCK_NAME).unlink()
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise PearError(f"cannot write {out}: {error.strerror}; choose another OUT") from error
            raise


def _already_exported(store: Store, settings: ExportSettings, shards: list[AlignedShard], out: Path) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    path = out / EXPORT_MANIFEST
    if not path.is_file():
        raise UsageError(f"{out} exists and is no export of ours: choose another OUT")
    try:
        there = ExportManifest.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UsageError(f"{path} is not readable as an export's manifest: choose another OUT") from None
    wanted = _manifest(store, settings, shards, _Totals())
    fields = {"format", "weighting", "weighting_settings", "weights_sha256"}
    before, after = there.model_dump(include=fields), wanted.model_dump(include=fields)
    if before != after:
        differences = "; ".join(differing_fields(before, after))
        raise MismatchError(f"{out} holds another export ({differences}): remove it or choose another OUT")
    return True


def _write_shards(
    store: Store, key: str, shards: list[AlignedShard], folder: Path, title: str, progress: Progress
) -> _Totals:
    totals = _Totals()
    progress.begin(title, sum(shard.entries[CORPUS].num_tokens for shard in shards), "tokens")
    try:
        for index, shard in enumerate(shards):
            # Loaders take a file called train-* for the split of that name and leave pear_export.json alone.
            _write_shard(store, key, shard, folder / f"train-{index:05d}.parquet", totals, progress)
            progress.shard(shard.name, f"{totals.samples} samples so far")
    finally:
        progress.end()
    return totals


def _write_shard(
    store: Store, key: str, shard: AlignedShard, path: Path, totals: _Totals, progress: Progress
) -> None:
    columns = {CORPUS: ["source", "input_ids", "loss_mask"], key: ["weights", "status"]}
    with parquet_shard(path, EXPORT_HF) as writer:
        for tables in aligned_row_groups(store, shard, columns):
            corpus, weights = tables[CORPUS], tables[key]
            progress.advance(int(list_lengths(corpus["input_ids"]).sum()))
            ok = np.asarray(weights["status"].to_numpy() == STATUS_OK, dtype=np.bool_)
            totals.left_out.update(weights["status"].filter(pa.array(~ok)).to_pylist())
            if ok.any():
                keep = pa.array(ok)
                table = _hf_rows(corpus.filter(keep), flat_values(weights["weights"].filter(keep)), totals)
                write_group(writer, table)


def _hf_rows(corpus: pa.Table, weights: npt.NDArray[np.float32], totals: _Totals) -> pa.Table:
    lengths = list_lengths(corpus["input_ids"])
    input_ids, scored = flat_values(corpus["input_ids"]), flat_values(corpus["loss_mask"])
    loss_weights = np.zeros(len(input_ids), dtype=np.float32)
    loss_weights[scored] = weights
    totals.samples += len(corpus)
    totals.num_tokens += len(input_ids)
    totals.num_scored += len(weights)
    totals.weight_sum += float(weights.sum(dtype=np.float64))
    columns = {
        "input_ids": list_column(input_ids, lengths, INPUT_IDS),
        "attention_mask": list_column(
            np.ones(len(input_ids), dtype=np.int8), lengths, EXPORT_HF.field("attention_mask").type
        ),
        "labels": list_column(
            np.where(scored, input_ids, IGNORED_LABEL).astype(np.int32), lengths, INPUT_IDS
        ),
        "loss_weights": list_column(loss_weights, lengths, FLOATS),
        "sample_id": corpus["sample_id"],
        "source": corpus["source"],
    }
    return pa.table([columns[name] for name in EXPORT_HF.names], schema=EXPORT_HF)


def _manifest(
    store: Store, settings: ExportSettings, shards: list[AlignedShard], totals: _Totals
) -> ExportManifest:
    key = f"weights/{settings.weights}"
    tokenizer = store.manifest.tokenizer
    assert tokenizer is not None
    return ExportManifest(
        format=settings.format,
        created_by=f"pear-data {__version__}",
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        template_fingerprint=tokenizer.template_fingerprint,
        weighting=settings.weights,
        weighting_settings=store.stage(key).settings,
        weights_sha256=[shard.entries[key].file.sha256 for shard in shards],
        samples=totals.samples,
        num_tokens=totals.num_tokens,
        num_scored=totals.num_scored,
        mean_weight=totals.weight_sum / max(totals.num_scored, 1),
        left_out=dict(totals.left_out),
    )
