"""Reading several stages of one shard in step: same rows, same order, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pear_data.errors import MismatchError
from pear_data.store import Store
from pear_data.store.manifest import CORPUS, Shard


@dataclass(frozen=True, slots=True)
class AlignedShard:
    """One shard's entry in the corpus and in each further stage."""

    name: str
    entries: dict[str, Shard]

    @property
    def checksums(self) -> dict[str, str]:
        """sha256 of each stage's file: what a shard made from these depends on."""
        return {key: entry.file.sha256 for key, entry in self.entries.items()}


def aligned_shards(store: Store, keys: Sequence[str]) -> list[AlignedShard]:
    """Every shard of the corpus with its counterparts in the finished stages `keys`.

    Raises:
        UsageError: a stage is missing or not finished.
        MismatchError: a stage lacks a shard, or made it from something else than the store holds now.
    """
    corpus = store.complete_stage(CORPUS)
    for key in keys:
        store.complete_stage(key)
        if fault := outdated(store, key):
            raise MismatchError(fault)
    return [
        AlignedShard(
            shard.name, {CORPUS: shard, **{key: _counterpart(store, key, shard.name) for key in keys}}
        )
        for shard in corpus.shards
    ]


def outdated_inputs(store: Store, shard: Shard) -> list[str]:
    """The stages whose present shard of this name is not the one that `shard` was made from."""
    stages = store.manifest.stages
    present = {key: stages[key].shard(shard.name) if key in stages else None for key in shard.inputs}
    return [key for key, entry in present.items() if entry is None or entry.file.sha256 != shard.inputs[key]]


def outdated(store: Store, key: str) -> str | None:
    """Why the finished shards of a stage are not of what the store holds now, or None where they are."""
    for shard in store.stage(key).shards:
        for source in outdated_inputs(store, shard):
            return (
                f"{key} in {store.path} was not made from the present {source} (shard {shard.name}): "
                "run the command that makes it again, with --overwrite where settings changed"
            )
    return None


def _counterpart(store: Store, key: str, name: str) -> Shard:
    entry = store.stage(key).shard(name)
    if entry is None:
        raise MismatchError(f"{key} in {store.path} lacks {name}: run the command that makes it again")
    return entry


def aligned_row_groups(
    store: Store, shard: AlignedShard, columns: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, pa.Table]]:
    """The row groups of a shard, each as one table per stage; `columns` always include sample_id.

    Raises:
        MismatchError: the stages differ in their rows.
    """
    readers = {
        key: store.row_groups(shard.entries[key], ["sample_id", *wanted]) for key, wanted in columns.items()
    }
    try:
        for group in zip(*readers.values(), strict=True):
            tables = dict(zip(readers, group, strict=True))
            first_key, *other_keys = tables
            for key in other_keys:
                if not tables[key]["sample_id"].equals(tables[first_key]["sample_id"]):
                    raise MismatchError(
                        f"{shard.name}: the rows of {key} are not those of {first_key}: run `pear-data verify`"
                    )
            yield tables
    except ValueError:
        raise MismatchError(f"{shard.name}: stages differ in row groups: run `pear-data verify`") from None
