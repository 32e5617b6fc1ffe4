from __future__ import annotations

import numpy as np
from ingest_cases import examples, write_lines

from pear_data.corpus.batches import token_batches
from pear_data.stages import ingest_shard
from pear_data.store import open_store


def test_shards_and_row_groups_are_cut_by_tokens(tmp_path, run, read, monkeypatch):
    monkeypatch.setattr(ingest_shard, "GROUP_TOKENS", 500)
    path = write_lines(tmp_path / "a.jsonl", examples(100))
    run(path, shard_tokens=2000)
    store = open_store(tmp_path / "store")
    shards = store.stage("corpus").shards
    assert [shard.name for shard in shards] == [f"part-{n:05d}" for n in range(len(shards))]
    assert all(2000 <= shard.num_tokens < 4000 for shard in shards[:-1])
    for shard in shards:
        groups = [batch.offsets[-1] for batch in token_batches(store, shard)]
        assert sum(groups) == shard.num_tokens
    assert [row["sample_id"] for row in read()] == [f"a.jsonl:{n}" for n in range(1, 101)]


def test_token_batches_hold_what_the_rows_hold(tmp_path, run, read, monkeypatch):
    monkeypatch.setattr(ingest_shard, "GROUP_TOKENS", 500)
    run(write_lines(tmp_path / "a.jsonl", examples(60)), shard_tokens=1000)
    store = open_store(tmp_path / "store")
    batches = [batch for shard in store.stage("corpus").shards for batch in token_batches(store, shard)]
    assert len(batches) > len(store.stage("corpus").shards)
    rows = iter(read())
    for batch in batches:
        assert batch.input_ids.dtype == np.int32
        assert batch.loss_mask.dtype == bool
        for sample_id, start, end in zip(
            batch.sample_ids, batch.offsets[:-1], batch.offsets[1:], strict=True
        ):
            row = next(rows)
            assert row["sample_id"] == sample_id
            assert row["input_ids"] == batch.input_ids[start:end].tolist()
            assert row["loss_mask"] == batch.loss_mask[start:end].tolist()
