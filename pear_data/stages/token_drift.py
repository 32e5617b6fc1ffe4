"""Token ids that one policy all but never writes where the other does: the trace of two tokenizers or templates.

An end-of-turn token, a think tag or a renumbered special token shows as an id whose every occurrence is near certain
for one policy and near impossible for the other. What a policy merely finds unlikely now and then does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pear_data.config import BASELINES, WeightSettings
from pear_data.errors import MismatchError
from pear_data.schema import STATUS_OK
from pear_data.stages.findings import Finding
from pear_data.stages.remedies import in_words
from pear_data.stages.spans import spanned_policies
from pear_data.stages.text import one_line
from pear_data.store import Store
from pear_data.store.columns import flat_values
from pear_data.store.manifest import CORPUS, Shard

# What is looked at: enough to meet a special token thousands of times, little enough to read in no time.
LOOKED_AT_SHARDS = 8
LOOKED_AT_TOKENS = 1_000_000
# An occurrence is odd where one policy gives it less than 1 in 150 and the other more than 1 in 2.
IMPOSSIBLE, LIKELY = -5.0, -0.7
# An id is drifting where it is met this often, and this share of it is odd.
OCCURRENCES = 20
ODD_SHARE = 0.8
# Where the other tokens are odd this often too, the policies are far apart everywhere: no matter of single ids.
ODD_REST = 0.1
SHOWN_IDS = 5
SHOWN_CHARACTERS = 40

Counts = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

LIST_IDS = (
    "pear-data sql 'select token_id, any_value(token) as token, count(*) as n, avg(log_ratio) as mean_log_ratio "
    "from tokens group by token_id having n >= 20 order by abs(mean_log_ratio) desc limit 20'"
)


@dataclass(slots=True)
class _Ids:
    """Sums by token id [V] over the tokens looked at; arrays grow with the greatest id met."""

    occurrences: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    odd: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    log_ratio: Floats = field(default_factory=lambda: np.zeros(0))

    def add(self, ids: Ids, target: npt.NDArray[np.float32], behavior: npt.NDArray[np.float32]) -> None:
        """Count tokens [N] with their log-probs under both policies."""
        least, most = np.minimum(target, behavior), np.maximum(target, behavior)
        odd = (least < IMPOSSIBLE) & (most > LIKELY)
        size = max(len(self.occurrences), int(ids.max(initial=-1)) + 1)
        log_ratio = np.subtract(target, behavior, dtype=np.float64)
        self.occurrences = _grown(self.occurrences, size) + np.bincount(ids, minlength=size)
        self.odd = _grown(self.odd, size) + np.bincount(ids[odd], minlength=size)
        self.log_ratio = _grown(self.log_ratio, size) + np.bincount(ids, log_ratio, size)

    def drifting(self) -> Counts:
        """Ids that drift, those with the greatest sum of log-ratios first."""
        drifts = (self.occurrences >= OCCURRENCES) & (self.odd >= ODD_SHARE * self.occurrences)
        rest = int(self.occurrences[~drifts].sum())
        if self.odd[~drifts].sum() > ODD_REST * rest:
            return np.empty(0, np.int64)
        ids = np.flatnonzero(drifts)
        return ids[np.argsort(-np.abs(self.log_ratio[ids]), kind="stable")]


def drift_findings(store: Store, settings: WeightSettings) -> list[Finding]:
    """The ids on which a weighting's two policies disagree throughout; at most one finding.

    Looks at about LOOKED_AT_TOKENS scored tokens of shards spread evenly over the corpus; checksums are left to
    `pear-data verify`. Nothing is found of policies scored on tokens of their own: their log-probs are not by id.

    Raises:
        MismatchError: a file looked at is missing or cut short, or its rows are not those of the corpus.
    """
    policies = (settings.target, settings.behavior)
    if settings.level in BASELINES or spanned_policies(store.manifest, *policies):
        return []
    found = _Ids()
    shards = [shard for shard in store.stage(CORPUS).shards if shard.rows]
    spread = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), LOOKED_AT_SHARDS)).astype(int))
    for shard in (shards[index] for index in spread):
        scored = [store.stage(f"scores/{policy}").shard(shard.name) for policy in policies]
        scores = [entry for entry in scored if entry is not None]
        if len(scores) == len(policies):
            try:
                found.add(*_tokens(store, [shard, *scores], LOOKED_AT_TOKENS // len(spread)))
            except (ValueError, IndexError, pa.ArrowException, OSError):
                raise MismatchError(
                    f"{shard.name} of the corpus or of a policy cannot be read: run `pear-data verify`, which names it"
                ) from None
    ids = found.drifting()
    return [_finding(store, found, ids)] if len(ids) else []


def _tokens(
    store: Store, shards: list[Shard], budget: int
) -> tuple[Ids, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Ids and both policies' log-probs [N] of about `budget` scored tokens, from the start of a middle row group.

    `shards` are entries of one shard: the corpus's, the target's and the behavior policy's.
    """
    files = [_present(store, shard) for shard in shards]
    with pq.ParquetFile(files[0]) as parquet:
        group, groups = parquet.num_row_groups // 2, parquet.num_row_groups
        share = min(1.0, budget * groups / max(1, shards[0].num_scored))
        rows = math.ceil(share * parquet.metadata.row_group(group).num_rows)
    columns = (["input_ids", "loss_mask"], ["logprobs", "status"], ["logprobs", "status"])
    tables = [_beginning(file, group, rows, names) for file, names in zip(files, columns, strict=True)]
    if any(not table["sample_id"].equals(tables[0]["sample_id"]) for table in tables[1:]):
        raise MismatchError(
            f"{shards[0].name}: the rows of the policies are not those of the corpus: run `pear-data verify`"
        )
    is_ok = [table["status"].to_numpy(zero_copy_only=False) == STATUS_OK for table in tables[1:]]
    corpus, target, behavior = (table.filter(pa.array(is_ok[0] & is_ok[1])) for table in tables)
    ids = flat_values(corpus["input_ids"])[flat_values(corpus["loss_mask"])]
    return ids, flat_values(target["logprobs"]), flat_values(behavior["logprobs"])


def _present(store: Store, shard: Shard) -> Path:
    """The file of a shard, its size checked: a checksum would read all of it."""
    if fault := store.fault_of(shard.file, size_only=True):
        raise MismatchError(f"{store.path / shard.file.path} {fault}: run `pear-data verify`")
    return store.path / shard.file.path


def _beginning(path: Path, group: int, rows: int, columns: list[str]) -> pa.Table:
    """The first rows of a row group; what follows is not decoded."""
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as parquet:
        batches = parquet.iter_batches(rows, row_groups=[group], columns=["sample_id", *columns])
        return pa.Table.from_batches([next(batches)])


def _grown(values: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    return np.pad(values, (0, size - len(values)))


def _finding(store: Store, found: _Ids, ids: Counts) -> Finding:
    texts = _texts(store, ids[:SHOWN_IDS])
    told = [
        f"{token}{texts.get(token, '')} ({found.occurrences[token]:,} times, mean log-ratio "
        f"{found.log_ratio[token] / found.occurrences[token]:.3g})"
        for token in ids[:SHOWN_IDS].tolist()
    ]
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    shares = found.odd[ids] / found.occurrences[ids]
    remedies = [
        in_words(
            "comparing the chat templates and special tokens of both models at these ids "
            f"(`pear-data show SAMPLE_ID --table`, `{LIST_IDS}`) and scoring again"
        ),
        in_words(
            "scoring the policy that has another tokenizer or template with `pear-data score --align bytes`"
        ),
    ]
    return Finding.of(
        "token_drift",
        float(shares.min()),
        ODD_SHARE,
        f"One policy all but never writes what the other always does at {len(ids):,} token ids: "
        f"{', '.join(told)}{more} (looked for on {found.occurrences.sum():,} scored tokens). Their tokenizers or "
        "chat templates seem to differ there.",
        remedies,
    )


def _texts(store: Store, ids: Counts) -> dict[int, str]:
    """What the ids stand for, safe to show; nothing where the store has no tokenizer."""
    tokenizer = store.manifest.tokenizer
    if tokenizer is None:
        return {}
    table = pq.read_table(store.file(tokenizer.vocabulary), filters=[("token_id", "in", ids.tolist())])
    pairs = zip(table["token_id"].to_pylist(), table["token"].to_pylist(), strict=True)
    return {token_id: f' "{one_line(token)[:SHOWN_CHARACTERS]}"' for token_id, token in pairs}
