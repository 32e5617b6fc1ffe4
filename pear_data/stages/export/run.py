"""`pear-data export`: a dataset is written beside its place and renamed into it when whole and read again."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pear_data.config import ExportSettings
from pear_data.errors import MismatchError, UsageError
from pear_data.progress import Outcome, Progress
from pear_data.schema import STATUS_OK
from pear_data.stages.alignment import AlignedShard, aligned_row_groups, aligned_shards
from pear_data.stages.export.files import SplitFiles
from pear_data.stages.export.folder import remove_lock, whole_folder
from pear_data.stages.export.formats import Format, format_of
from pear_data.stages.export.live import behavior_policy, live_settings
from pear_data.stages.export.manifest import (
    DETERMINED_BY,
    EXPORT_MANIFEST,
    ExportedFile,
    ExportManifest,
    LiveSettings,
    Split,
    read_export_manifest,
)
from pear_data.stages.export.reread import check_export, file_fault
from pear_data.stages.export.rows import Rows, rows_of
from pear_data.stages.export.selection import Where, in_validation
from pear_data.stages.export.totals import Totals, manifest_of, nothing_left, summary
from pear_data.store import Store
from pear_data.store.columns import list_lengths
from pear_data.store.commit import write_atomically
from pear_data.store.manifest import CORPUS, differing_fields


@dataclass(frozen=True, slots=True)
class _Job:
    """What an export is made from."""

    store: Store
    settings: ExportSettings
    shards: list[AlignedShard]
    form: Format
    live: LiveSettings | None

    @property
    def weights(self) -> str:
        return f"weights/{self.settings.weights}"

    @property
    def behavior(self) -> str | None:
        return f"scores/{self.live.behavior}" if self.live else None

    def manifest(self, totals: Totals, files: list[ExportedFile]) -> ExportManifest:
        sha256 = [
            [shard.entries[key].file.sha256 for shard in self.shards] if key else []
            for key in (self.weights, self.behavior)
        ]
        return manifest_of(
            self.store,
            self.settings,
            self.form,
            totals,
            files,
            weights=sha256[0],
            live=(self.live, sha256[1]),
        )


def export(store: Store, settings: ExportSettings, progress: Progress) -> Outcome:
    """Write a weighted dataset to a new directory; samples whose weights have another status than ok stay out.

    Every file is read again before the directory appears. With `settings.check` nothing is written, and the export that
    stands at OUT is read instead.

    Raises:
        UsageError: the weighting is missing or unfinished, OUT holds something else, or the format, `live` or `where`
            does not go with this store.
        MismatchError: OUT holds an export of other weights; names the fields that differ. Or a file of it changed.
        PearError: a sample cannot be said in the format without dropping or casting a value; names it.
    """
    out = Path(settings.out)
    if settings.check:
        return check_export(out, progress)
    job = _job(store, settings)
    if _already_exported(job, out):
        return Outcome(f"{out}: already holds this export; nothing to do")
    with whole_folder(out) as partial:
        totals, files = _write(job, partial, progress)
        if not totals.samples["train"]:
            raise UsageError(nothing_left(job.weights, settings, totals))
        manifest = job.manifest(totals, files)
        write_atomically(partial / EXPORT_MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return Outcome(f"{summary(out, manifest)}\n{job.form.advice}")


def _job(store: Store, settings: ExportSettings) -> _Job:
    weights = f"weights/{settings.weights}"
    store.complete_stage(weights)
    behavior = behavior_policy(store, settings)
    shards = aligned_shards(store, [weights, f"scores/{behavior}"] if behavior else [weights])
    live = live_settings(store, settings.weights, behavior) if behavior else None
    return _Job(store, settings, shards, format_of(store, settings), live)


def _already_exported(job: _Job, out: Path) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    there = read_export_manifest(out)
    wanted = job.manifest(Totals(), [])
    before, after = (one.model_dump(mode="json", include=DETERMINED_BY) for one in (there, wanted))
    if before != after:
        differences = "; ".join(differing_fields(before, after))
        raise MismatchError(f"{out} holds another export ({differences}): remove it or choose another OUT")
    remove_lock(out)
    return True


def _write(job: _Job, folder: Path, progress: Progress) -> tuple[Totals, list[ExportedFile]]:
    settings, totals = job.settings, Totals()
    fault = file_fault(settings.format, settings.max_length, live=settings.live)
    tokens = sum(shard.entries[CORPUS].num_tokens for shard in job.shards)
    progress.begin(f"export {settings.out}", tokens, "tokens")
    try:
        with SplitFiles(folder, job.form, fault, settings.shard_tokens) as files:
            for shard in job.shards:
                for rows in _admitted_rows(job, shard, totals, progress):
                    evaluated = in_validation(job.store, rows.sample_id, settings.eval_fraction)
                    _write_rows(rows, evaluated, files, totals)
                progress.shard(shard.name, f"{totals.samples.total()} samples so far")
        return totals, files.written
    finally:
        progress.end()


def _admitted_rows(job: _Job, shard: AlignedShard, totals: Totals, progress: Progress) -> Iterator[Rows]:
    """What is left of each row group: status ok, chosen, cut to length, representable in the format."""
    columns = {
        CORPUS: ["source", "input_ids", "loss_mask"] + (["record"] if job.form.needs_record else []),
        job.weights: ["weights", "status"],
    }
    if job.behavior:
        columns[job.behavior] = ["logprobs", "status"]
    chosen = Where(job.store, job.settings.weights, job.settings.where).chosen(shard)
    for tables in aligned_row_groups(job.store, shard, columns):
        progress.advance(int(list_lengths(tables[CORPUS]["input_ids"]).sum()))
        keep = pa.array(_kept(job, tables, chosen, totals))
        scores = tables[job.behavior].filter(keep) if job.behavior else None
        rows = rows_of(tables[CORPUS].filter(keep), tables[job.weights].filter(keep), scores)
        if job.settings.max_length is not None:
            rows = _within(rows, job.settings.max_length, totals, whole=job.live is not None)
        if len(rows):
            rows, left_out = job.form.admitted(rows)
            totals.left_out.update(left_out)
        if len(rows):
            yield rows


def _kept(
    job: _Job, tables: dict[str, pa.Table], chosen: Collection[str] | None, totals: Totals
) -> npt.NDArray[np.bool_]:
    """Whether each sample stays in; what does not is counted by its status, or as `where`."""
    status = tables[job.weights]["status"].to_numpy()
    keep = np.asarray(status == STATUS_OK, dtype=np.bool_)
    totals.left_out.update(status[~keep].tolist())
    if job.behavior:
        of_behavior = tables[job.behavior]["status"].to_numpy()
        lacking = keep & (of_behavior != STATUS_OK)
        totals.left_out.update(f"{job.behavior} {one}" for one in of_behavior[lacking].tolist())
        keep &= ~lacking
    if chosen is not None:
        names = tables[CORPUS]["sample_id"].to_pylist()
        fulfils = np.fromiter((name in chosen for name in names), dtype=np.bool_, count=len(names))
        totals.left_out["where"] += int((keep & ~fulfils).sum())
        keep &= fulfils
    return keep


def _within(rows: Rows, max_length: int, totals: Totals, *, whole: bool) -> Rows:
    """Samples cut to `max_length`, or left out: without a scored token, or where they must stay `whole`.

    A live weight is made of all log-ratios behind it, so that of a cut sample would not be its weighting's.
    """
    over = rows.lengths > max_length
    if not over.any():
        return rows
    if whole:
        totals.left_out["longer_than_max_length"] += int(over.sum())
        return rows.take(~over)
    before = rows.lengths
    rows = rows.cut(max_length)
    scored = rows.num_scored > 0
    totals.cut += int((over & scored).sum())
    totals.cut_tokens += int((before - rows.lengths)[scored].sum())
    totals.left_out["nothing_scored_within_max_length"] += int((~scored).sum())
    return rows.take(scored)


def _write_rows(rows: Rows, evaluated: npt.NDArray[np.bool_], files: SplitFiles, totals: Totals) -> None:
    totals.num_tokens += len(rows.input_ids)
    totals.num_scored += int(rows.scored.sum())
    totals.weight_sum += float(rows.loss_weights.sum(dtype=np.float64))
    parts: dict[Split, Rows] = {"train": rows.take(~evaluated), "validation": rows.take(evaluated)}
    for split, part in parts.items():
        totals.samples[split] += len(part)
        files.write(split, part)
