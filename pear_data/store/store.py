"""The store: committed shards under a manifest, read with their checksums and written one stage at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_data import __version__
from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.redaction import redacted_values
from pear_data.schema import FORMAT_VERSION
from pear_data.store.commit import (
    TEMP_SUFFIX,
    operation,
    sha256_of,
    sweep_leftovers,
    sweep_replaced,
    write_atomically,
)
from pear_data.store.lock import LOCK_NAME, exclusive
from pear_data.store.manifest import (
    CORPUS,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Shard,
    Stage,
    differing_fields,
    fingerprint,
    read_manifest,
    sealed,
)
from pear_data.store.reading import is_refusal, reading, refused

if TYPE_CHECKING:
    import pyarrow.dataset as ds


class Store:
    """A folder of artefacts. Open one with `open_store`; commands that write use `writable_store`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._checked: set[tuple[str, str]] = set()

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def corpus(self) -> ds.Dataset:
        """The tokenized corpus as a pyarrow dataset (schema: `pear_data.schema.CORPUS`)."""
        return self._dataset(CORPUS)

    @property
    def scores(self) -> dict[str, ds.Dataset]:
        """Each policy's log-probs as a pyarrow dataset, by policy."""
        return {name: self._dataset(f"scores/{name}") for name in self.manifest.names("scores")}

    @property
    def weights(self) -> dict[str, ds.Dataset]:
        """Each weighting as a pyarrow dataset, by name."""
        return {name: self._dataset(f"weights/{name}") for name in self.manifest.names("weights")}

    def stage(self, key: str) -> Stage:
        """The stage `corpus`, `scores/<policy>` or `weights/<name>`.

        Raises:
            UsageError: the store has no such stage; says which command makes it.
        """
        if key in self.manifest.stages:
            return self.manifest.stages[key]
        kind, _, name = key.partition("/")
        have = ", ".join(self.manifest.names(kind)) or "none"
        remedy = {
            "corpus": "`pear-data ingest CORPUS --tokenizer M`",
            "scores": f"`pear-data score --policy {name} --model M` (have: {have})",
            "weights": f"`pear-data weight --name {name}` (have: {have})",
        }[kind]
        raise UsageError(f"{self.path} has no {key}: make it with {remedy}")

    def complete_stage(self, key: str) -> Stage:
        """Like `stage`, and refuses one that is not finished.

        Raises:
            UsageError: the stage is missing or has shards left to do.
        """
        stage = self.stage(key)
        if not stage.complete:
            done, total = len(stage.shards), len(self.stage(CORPUS).shards)
            raise UsageError(
                f"{key} in {self.path} is not finished ({done} of {total} shards): run the command that makes it again"
            )
        return stage

    def file(self, entry: FileEntry) -> Path:
        """Path of a committed file, after its size and sha256 are checked (once per process).

        Raises:
            MismatchError: it is gone, cut short or changed.
        """
        path = self.path / entry.path
        if (entry.path, entry.sha256) not in self._checked:
            fault = self.fault_of(entry)
            if fault:
                raise MismatchError(
                    f"{path} {fault}: run `pear-data verify`, then the command that made it, to make it again"
                )
            self._checked.add((entry.path, entry.sha256))
        return path

    def fault_of(self, entry: FileEntry, *, size_only: bool = False) -> str | None:
        """What is wrong with a committed file ("is missing", ...), or None.

        Raises:
            PearError: the system would not let us read it.
        """
        path = self.path / entry.path
        if not path.is_file():
            return "is missing"
        if _leads_out(self.path, path):
            return "is reached by a link that leads out of the store"
        size = path.stat().st_size
        if size != entry.bytes:
            return f"has {size} bytes where the manifest says {entry.bytes}"
        try:
            if not size_only and sha256_of(path) != entry.sha256:
                return "does not match its sha256 in the manifest"
        except OSError as error:
            if is_refusal(error):
                raise refused(path, error) from error
            return f"cannot be read ({error.strerror})"
        return None

    def row_groups(self, shard: Shard, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The row groups of a shard, one at a time. All stages cut a shard at the same rows."""
        path = self.file(shard.file)
        with reading(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as parquet:
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=list(columns) if columns else None)

    def sql(self, query: str) -> pa.Table:
        """The whole result of one DuckDB query over the store's views, see `pear_data.store.view_sql`.

        Raises:
            UsageError: the query is not a single reading statement.
            PearError: DuckDB refuses it.
        """
        from pear_data.store.views import connect

        with connect(self) as views:
            return views.table(query)

    # -- writing ---------------------------------------------------------------------------------------

    def begin(self, key: str, settings: dict[str, Any], *, overwrite: bool = False) -> Stage:
        """The stage to add shards to: a new one, or the one begun with equal settings.

        A stage without a shard holds nothing yet, and gives way to other settings.

        Raises:
            MismatchError: the stage exists with other settings; names each field that differs.
            UsageError: another stage's name differs from this one only in case.
        """
        settings = redacted_values(settings)
        alike = next((other for other in self.manifest.stages if other.lower() == key.lower()), key)
        if alike != key:
            raise UsageError(
                f"{self.path} has {alike} already, and SQL does not tell it from {key}: use another name"
            )
        stage = self.manifest.stages.get(key)
        if stage is not None and stage.shards and stage.settings != settings and not overwrite:
            fields = "; ".join(differing_fields(stage.settings, settings))
            raise MismatchError(
                f"{key} in {self.path} was made with other settings ({fields}): "
                + ("use another --store" if key == CORPUS else "use another name, or --overwrite")
            )
        if stage is None or stage.settings != settings:
            stage = Stage(settings=settings, fingerprint=fingerprint(settings))
            self.manifest.stages[key] = stage
            self.save()
        return stage

    def is_current(self, key: str, shard: Shard | None, inputs: dict[str, str]) -> bool:
        """Whether a shard is committed, whole, and made from these inputs."""
        if shard is None or shard.inputs != inputs or any(map(self.fault_of, shard.files)):
            return False
        self._checked.update((file.path, file.sha256) for file in shard.files)
        return True

    def commit(self, key: str, shard: Shard) -> None:
        """Enter a shard whose files are in place; it exists from here on, and one that it replaces does not."""
        stage = self.manifest.stages[key]
        replaced = stage.shard(shard.name)
        others = [other for other in stage.shards if other.name != shard.name]
        stage.shards = sorted([*others, shard], key=lambda entry: entry.name)
        self.save()
        kept = {file.path for file in shard.files}
        for file in replaced.files if replaced is not None else ():
            if file.path not in kept:
                with operation("remove", self.path / file.path):
                    (self.path / file.path).unlink(missing_ok=True)

    def entry_of(self, path: Path) -> FileEntry:
        """Size and checksum of a file that has just been put in place."""
        relative = path.relative_to(self.path).as_posix()
        return FileEntry(path=relative, bytes=path.stat().st_size, sha256=sha256_of(path))

    def save(self) -> None:
        """Write the manifest, atomically."""
        write_atomically(self.path / MANIFEST_NAME, sealed(self.manifest))

    def _dataset(self, key: str) -> ds.Dataset:
        import pyarrow.dataset as ds

        return ds.dataset([self.file(shard.file) for shard in self.stage(key).shards], format="parquet")


def _leads_out(folder: Path, path: Path) -> bool:
    """Whether links on the way from a store's folder to a path inside it lead elsewhere."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _refuse_links_out(folder: Path) -> None:
    """Nothing is written through a folder that is a link to somewhere else."""
    for at, folders, _ in os.walk(folder):
        for name in folders:
            path = Path(at, name)
            if path.is_symlink() and _leads_out(folder, path):
                raise PearError(f"{path} is a link that leads out of the store: put the folder itself there")


def open_store(path: str | Path) -> Store:
    """Open a store for reading.

    Raises:
        PearError: there is no store, or it was written by a newer version.
        MismatchError: its manifest is damaged.
    """
    folder = Path(path)
    return Store(folder, read_manifest(folder))


def _is_beginning(name: str) -> bool:
    """Whether a file may be of a store whose maker was killed before there was a manifest."""
    return name == LOCK_NAME or (name.startswith(f"{MANIFEST_NAME}.") and name.endswith(TEMP_SUFFIX))


@contextlib.contextmanager
def writable_store(path: str | Path, *, create: bool = False, any_version: bool = False) -> Iterator[Store]:
    """Open a store as its only writer, sweeping what a killed writer left.

    Raises:
        PearError: another process writes to it, or there is none and `create` is off, or the folder holds
            something else, or, without `any_version`, the store is of an earlier format version.
    """
    folder = Path(path)
    exists = (folder / MANIFEST_NAME).exists()
    if not exists:
        if not create:
            read_manifest(folder)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is not a folder: choose another --store")
        if folder.is_dir() and not all(_is_beginning(entry.name) for entry in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and is no store: choose another --store")
    with exclusive(folder):
        _refuse_links_out(folder)
        sweep_leftovers(folder)
        if (folder / MANIFEST_NAME).exists():
            store = open_store(folder)
            version = store.manifest.format_version
            if version < FORMAT_VERSION and not any_version:
                raise PearError(
                    f"{folder} has format version {version}, which is read and no longer written: "
                    f"run `pear-data migrate --store {folder}`, then this again"
                )
            sweep_replaced(folder, {folder / file.path for file in store.manifest.files})
        else:
            store = Store(folder, Manifest(created_by=f"pear-data {__version__}"))
            store.save()
        yield store
