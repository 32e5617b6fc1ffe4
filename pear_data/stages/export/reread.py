"""`pear-data export OUT --check`: an export read again, row by row, with nothing but its own manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pear_data.errors import MismatchError, PearError
from pear_data.progress import Outcome, Progress
from pear_data.stages.export.formats import Form
from pear_data.stages.export.manifest import ExportedFile, ExportManifest, read_export_manifest
from pear_data.store.commit import sha256_of

Fault = Callable[[Path], str | None]


def check_export(out: Path, progress: Progress) -> Outcome:
    """Read every row of an export: a fault is what its format's trainer would drop, cast or trip over.

    Raises:
        UsageError: there is no export at `out`.
        MismatchError: its files are not those that were written.
        PearError: a row is at fault; names it.
    """
    manifest = read_export_manifest(out)
    fault_of = file_fault(manifest.format, manifest.max_length, live=manifest.live is not None)
    _check_names(out, manifest)
    progress.begin(f"check {out}", len(manifest.files), "files")
    try:
        for file in manifest.files:
            _check_file(out / file.name, file, fault_of)
            progress.advance(1)
    finally:
        progress.end()
    rows = sum(file.rows for file in manifest.files)
    return Outcome(f"{out}: {len(manifest.files):,} files, {rows:,} rows, every one sound")


def file_fault(form: Form, max_length: int | None, *, live: bool) -> Fault:
    """What tells the first fault of a file of this format, with its row's name."""
    from pear_data.stages.export.check import table_fault
    from pear_data.stages.export.jsonl import lines_fault
    from pear_data.stages.export.messages import messages_fault
    from pear_data.stages.export.shifted import fault_of_length
    from pear_data.stages.export.swift import swift_fault
    from pear_data.stages.export.tables import SCHEMAS, with_live

    of_line = {"swift": swift_fault, "shifted": fault_of_length(max_length), "messages": messages_fault}
    if form in of_line:
        return lambda path: lines_fault(path, of_line[form])
    schema = with_live(SCHEMAS[form], live)
    return lambda path: table_fault(path, schema, max_length)


def _check_names(out: Path, manifest: ExportManifest) -> None:
    known = {file.name for file in manifest.files}
    for path in sorted(out.iterdir()):
        if path.name.startswith(("train-", "validation-")) and path.name not in known:
            raise MismatchError(f"{path} is not of this export, but loaders would read it: move it elsewhere")


def _check_file(path: Path, file: ExportedFile, fault_of: Fault) -> None:
    remedy = "remove the folder and export again"
    if not path.is_file():
        raise MismatchError(f"{path} is missing: {remedy}")
    fault = fault_of(path)
    if sha256_of(path) != file.sha256:
        raise MismatchError(
            f"{path} is not the file that was written (sha256){f'; {fault}' if fault else ''}: {remedy}"
        )
    if fault:
        raise PearError(f"{path}: {fault}: {remedy}")
