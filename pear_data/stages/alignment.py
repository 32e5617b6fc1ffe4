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
        MismatchError: a stage lacks a shard, or made it from another corpus shard than the present one.
    """
    stages = {key: store.complete_stage(key) for key in keys}
    shards = []
    for corpus_shard in store.complete_stage(CORPUS).shards:
        entries = {CORPUS: corpus_shard}
        for key, stage in stages.items():
            entry = stage.shard(corpus_shard.name)
            if entry is None or entry.inputs.get(CORPUS) != corpus_shard.file.sha256:
                raise MismatchError(
                    f"{key} in {store.path} was not made from the present corpus (shard {corpus_shard.name}): "
                    "run the command that makes it again"
                )
            entries[key] = entry
        shards.append(AlignedShard(corpus_shard.name, entries))
    return shards


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
