"""`pear-data migrate`: a store of an earlier format version becomes one of the present version, in place.

What version 2 has and version 1 lacks is made beside the store, in a whole store of its own whose corpus and scores are
links to the old ones; weights are made again from the stored log-probs, with the settings they had. A store is what its
manifest names, so two manifests bring it over, each written at once: the first is the old one, its weights named where
they were set aside; the second is the new one, over the files renamed into place in between.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.progress import Outcome, Progress
from pear_data.schema import CORPUS_SUMMARY, FORMAT_VERSION
from pear_data.stages.alignment import outdated
from pear_data.stages.measure import weighting_settings
from pear_data.stages.weight import weight
from pear_data.store import Store, writable_store
from pear_data.store.commit import (
    ASIDE,
    TEMP_SUFFIX,
    atomic_path,
    make_folder,
    operation,
    put_in_place,
    sync_folder,
    write_atomically,
)
from pear_data.store.manifest import CORPUS, MANIFEST_NAME, Manifest, Shard, read_manifest, sealed
from pear_data.store.shards import summary_path, summary_shard

_BESIDE = f"migration{TEMP_SUFFIX}"


def migrate(folder: Path, progress: Progress) -> Outcome:
    """Bring a store to the present format version, as its only writer.

    Killed at any moment it leaves the old store or the new one, and given again it ends what it began. It takes room
    for the new weights beside the old ones.

    Raises:
        PearError: there is no store, a newer pear-data wrote it, another process writes to it, or the disk refused.
        MismatchError: a file it needs is damaged.
    """
    with writable_store(folder, any_version=True) as store:
        before = store.manifest.format_version
        if before < FORMAT_VERSION:
            with _beside(store) as made:
                _bring_over(store, made, progress)
                _set_manifest_aside(store)
                _replace(store, made.manifest)
        lost = _forget_old(store)
    note = f"; {', '.join(lost)} could not be made again and stay in {folder / ASIDE}" if lost else ""
    if before == FORMAT_VERSION:
        return Outcome(f"{folder} has format version {before}, the present one: nothing to do{note}")
    made_again = ", ".join(store.manifest.names("weights")) or "none"
    return Outcome(
        f"{folder}: format version {before} is now {FORMAT_VERSION}; weightings made again: {made_again}{note}"
    )


@contextlib.contextmanager
def _beside(store: Store) -> Iterator[Store]:
    """A store inside the old one, with its corpus and scores and without weights."""
    manifest = store.manifest.model_copy(deep=True)
    manifest.format_version = FORMAT_VERSION
    for name in manifest.names("weights"):
        del manifest.stages[f"weights/{name}"]
    made = Store(store.path / _BESIDE, manifest)
    try:
        for entry in manifest.files:
            # What is missing or damaged stays so: the command that made it makes it again, as before.
            if (store.path / entry.path).is_file():
                _link(store.path / entry.path, made.path / entry.path)
        yield made
    finally:
        shutil.rmtree(made.path, ignore_errors=True)


def _bring_over(old: Store, made: Store, progress: Progress) -> None:
    """Add to the new store what the old one lacks, or has in another form."""

    def leave_out(what: str, reason: str) -> None:
        progress.say(f"{what}: {reason.replace(str(made.path), str(old.path))}")

    for shard in made.manifest.stages[CORPUS].shards if CORPUS in made.manifest.stages else []:
        try:
            _summarise(made, shard)
        except MismatchError as error:
            leave_out(f"no summary of {shard.name} of the corpus", str(error))
    for name in old.manifest.names("weights"):
        key = f"weights/{name}"
        if fault := outdated(old, key):
            leave_out(f"{key} cannot be made again", fault)
            continue
        try:
            progress.say(weight(made, weighting_settings(old, name), progress).summary)
        except (UsageError, MismatchError) as error:
            made.manifest.stages.pop(key, None)
            leave_out(f"{key} cannot be made again", str(error))


def _summarise(store: Store, shard: Shard) -> None:
    path = summary_path(store.path, CORPUS, shard.name)
    with summary_shard(path, CORPUS_SUMMARY) as writer:
        for table in store.row_groups(shard, CORPUS_SUMMARY.names):
            writer.add(table)
    shard.summary = store.entry_of(path)


def _set_manifest_aside(store: Store) -> None:
    copy = store.path / ASIDE / MANIFEST_NAME
    # A killed run's copy names the files where they were before it.
    if not copy.exists():
        write_atomically(copy, sealed(store.manifest))


def _replace(store: Store, new: Manifest) -> None:
    """Put the files of the new manifest in place of the old ones, and it in place of the old manifest."""
    weights = [
        entry
        for key, stage in store.manifest.stages.items()
        if key.startswith("weights/")
        for entry in stage.files
    ]
    # Those that a killed run has set aside are named so already.
    places = [entry.path.removeprefix(f"{ASIDE}/") for entry in weights]
    for entry, place in zip(weights, places, strict=True):
        if entry.path == place and (store.path / place).is_file():
            _link(store.path / place, store.path / ASIDE / place)
        entry.path = f"{ASIDE}/{place}"
    store.save()
    kept = {(entry.path, entry.sha256) for entry in store.manifest.files}
    for entry in new.files:
        if (entry.path, entry.sha256) not in kept:
            make_folder((store.path / entry.path).parent)
            put_in_place(store.path / _BESIDE / entry.path, store.path / entry.path)
    store.manifest = new
    store.save()
    named = {entry.path for entry in new.files}
    for place in places:
        if place not in named:
            (store.path / place).unlink(missing_ok=True)


def _forget_old(store: Store) -> list[str]:
    """Remove what was set aside, unless weightings in it have no successor; these are named."""
    aside = store.path / ASIDE
    if not (aside / MANIFEST_NAME).exists():
        shutil.rmtree(aside, ignore_errors=True)
        return []
    lost = [
        name
        for name in read_manifest(aside).names("weights")
        if f"weights/{name}" not in store.manifest.stages
    ]
    if not lost:
        shutil.rmtree(aside)
    return lost


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has none.

    Raises:
        PearError: the disk refused.
    """
    with operation("make folder", target):
        make_folder(target.parent)
        target.unlink(missing_ok=True)
    try:
        with operation("link", target):
            os.link(source, target)
        sync_folder(target)
    except PearError:
        with atomic_path(target) as temporary, operation("write", target):
            shutil.copyfile(source, temporary)
