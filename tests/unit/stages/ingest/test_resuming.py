"""Runs that end anywhere go on by themselves, to what an uninterrupted run makes."""

from __future__ import annotations

import gzip
import io
import sys
from datetime import date

import pyarrow.parquet as pq
import pytest
from ingest_cases import CHATML, KilledError, examples, mixed_corpus, save_tokenizer, write_lines

from pear_data.errors import MismatchError
from pear_data.stages import ingest as ingest_stage
from pear_data.stages import ingest_shard
from pear_data.store import open_store


def content(folder):
    """Everything in a store but what a tokenizer's files are called."""
    opened = open_store(folder)
    files = [
        file for shard in opened.stage("corpus").shards for file in (shard.file, shard.quarantine) if file
    ]
    tables = [pq.read_table(opened.file(file)) for file in files]
    groups = [pq.ParquetFile(opened.file(file)).num_row_groups for file in files]
    return opened.stage("corpus").model_dump(), tables, groups, sorted(p.name for p in folder.rglob("*"))


def test_a_run_killed_at_any_write_goes_on_to_the_same_result(tmp_path, run, die_at, monkeypatch):
    monkeypatch.setattr(ingest_shard, "GROUP_TOKENS", 300)
    corpus = mixed_corpus(tmp_path)
    writes = die_at(None)
    run(*corpus, shard_tokens=1000, store="whole")
    total = len(writes)
    wanted = content(tmp_path / "whole")
    quarantines = sum(shard["quarantine"] is not None for shard in wanted[0]["shards"])
    # The manifest twice, three files of the tokenizer, its vocabulary and entry; per shard a part, a summary, an entry.
    assert total == 2 + 5 + 3 * len(wanted[0]["shards"]) + quarantines + 1
    assert (len(wanted[0]["shards"]), quarantines) == (4, 4)
    for n in range(1, total + 1):
        store = f"killed-{n}"
        die_at(n)
        with pytest.raises(KilledError):
            run(*corpus, shard_tokens=1000, store=store)
        die_at(None)
        run(*corpus, shard_tokens=1000, store=store)
        assert content(tmp_path / store) == wanted


def test_a_run_killed_at_every_write_in_turn_gets_there(tmp_path, run, die_at):
    corpus = mixed_corpus(tmp_path)
    die_at(None)
    run(*corpus, shard_tokens=1000, store="whole")
    for attempt in range(100):
        die_at(5 if attempt else 11)  # far enough for one shard, the first time behind the tokenizer
        try:
            run(*corpus, shard_tokens=1000)
        except KilledError:
            continue
        break
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_nothing_is_done_twice(tmp_path, run, die_at, monkeypatch):
    corpus = mixed_corpus(tmp_path)
    run(*corpus, shard_tokens=1000)
    writes = die_at(None)
    monkeypatch.setattr(ingest_stage, "tokenized_batches", None)
    _, said = run(*corpus, shard_tokens=1000)
    assert writes == []
    assert said == [f"the corpus in {tmp_path / 'store'} is complete already"]


class _Leap(date):
    @classmethod
    def today(cls):
        return cls(2024, 2, 29)


class _Later(date):
    @classmethod
    def today(cls):
        return cls(2024, 3, 7)


def test_a_run_resumed_on_another_day_writes_the_date_it_began_with(tmp_path, run, die_at, monkeypatch):
    dated = save_tokenizer(
        tmp_path / "dated",
        "{{- '<|im_start|>system\\n' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + CHATML,
    )
    corpus = mixed_corpus(tmp_path)
    settings = {"tokenizer": dated, "shard_tokens": 1000}
    monkeypatch.setattr(ingest_stage, "date", _Leap)
    run(*corpus, **settings, store="whole")
    die_at(13)  # behind the first shard
    with pytest.raises(KilledError):
        run(*corpus, **settings)
    die_at(None)
    assert open_store(tmp_path / "store").stage("corpus").shards
    monkeypatch.setattr(ingest_stage, "date", _Later)
    _, said = run(*corpus, **settings)
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    assert any(line.startswith("date written by the chat template: 2024-02-29") for line in said)
    stage = open_store(tmp_path / "store").stage("corpus")
    assert stage.settings["chat_template_date"] == stage.decisions["chat_template_date"] == "2024-02-29"
    assert "is complete already" in run(*corpus, **settings)[1][-1]
    run(*corpus, **settings, store="begun-later")
    later = open_store(tmp_path / "begun-later").stage("corpus")
    assert later.settings["chat_template_date"] == "2024-03-07"
    assert later.shards[0].file.sha256 != stage.shards[0].file.sha256


def test_a_template_without_a_date_keeps_none(tmp_path, run):
    run(write_lines(tmp_path / "a.jsonl", examples(5)))
    stage = open_store(tmp_path / "store").stage("corpus")
    assert "chat_template_date" not in {**stage.settings, **stage.decisions}


def test_the_same_corpus_elsewhere_resumes(tmp_path, run, tokenizer):
    a, b = mixed_corpus(tmp_path)
    run(a, b)
    moved = tmp_path / "moved"
    moved.mkdir()
    _, said = run(a.rename(moved / "a.jsonl"), b.rename(moved / "b.parquet"))
    assert "is complete already" in said[-1]


@pytest.mark.parametrize("damage", ["cut short", "a flipped bit", "gone", "quarantine gone"])
def test_damaged_shards_are_made_again(tmp_path, run, damage):
    corpus = mixed_corpus(tmp_path)
    run(*corpus, shard_tokens=1000)
    wanted = content(tmp_path / "store")
    part = tmp_path / "store" / "corpus" / "part-00001.parquet"
    whole = bytearray(part.read_bytes())
    if damage == "cut short":
        part.write_bytes(whole[:-1])
    elif damage == "a flipped bit":
        whole[100] ^= 1
        part.write_bytes(whole)
    elif damage == "gone":
        part.unlink()
    else:
        (tmp_path / "store" / "quarantine" / "corpus-part-00000.parquet").unlink()
    _, said = run(*corpus, shard_tokens=1000)
    first = "part-00000" if damage == "quarantine gone" else "part-00001"
    assert f"making the corpus again from {first} on" in said[0]
    assert content(tmp_path / "store") == wanted


def test_another_corpus_or_setting_is_refused_by_name(tmp_path, run, rewriting_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", examples(5))
    other = write_lines(tmp_path / "b.jsonl", examples(5))
    run(path)
    for corpus, settings, field in [
        ([other], {}, "inputs"),
        ([path, other], {}, "inputs"),
        ([path], {"turns": "last"}, 'turns: was null, now "last"'),
        ([path], {"limit": 3}, "limit: was null, now 3"),
        ([path], {"shard_tokens": 7}, "shard_tokens: was 4000000, now 7"),
        ([path], {"source_field": "messages"}, "source_field"),
        ([path], {"tokenizer": rewriting_tokenizer}, "chat_template"),
        ([path], {"trust_remote_code": True}, "trust_remote_code"),
    ]:
        with pytest.raises(MismatchError, match="use another --store") as caught:
            run(*corpus, **settings)
        assert field in str(caught.value)
    run(path, max_bad=0)  # no bearing on the content


def test_a_changed_input_is_refused(tmp_path, run):
    path = write_lines(tmp_path / "a.jsonl", examples(5))
    run(path)
    write_lines(path, examples(6))
    with pytest.raises(MismatchError, match=r"inputs: was \[\{"):
        run(path)


def test_a_limit_counts_rows_across_shards_and_inputs(tmp_path, run, read, quarantine, die_at):
    corpus = mixed_corpus(tmp_path)
    die_at(12)
    with pytest.raises(KilledError):
        run(*corpus, limit=40, shard_tokens=1000)
    assert open_store(tmp_path / "store").stage("corpus").shards
    die_at(None)
    run(*corpus, limit=40, shard_tokens=1000)
    assert len(read()) + len(quarantine()) == 40
    assert read()[-1]["sample_id"] == "b.parquet:7"


def test_standard_input_resumes_too(tmp_path, run, read, monkeypatch, die_at):
    packed = gzip.compress(write_lines(tmp_path / "a.jsonl", examples(30)).read_bytes())

    def give():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed)))

    give()
    die_at(11)
    with pytest.raises(KilledError):
        run("-", shard_tokens=1000)
    give()
    die_at(None)
    _, said = run("-", shard_tokens=1000)
    assert any(line.startswith("going on behind part-0000") for line in said)
    assert [row["sample_id"] for row in read()] == [f"stdin:{n}" for n in range(1, 31)]
    assert {row["source"] for row in read()} == {"stdin"}
    assert not list((tmp_path / "store").glob("stdin*"))
