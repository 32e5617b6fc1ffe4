"""Whatever an input holds, each of its rows ends up as a sample or in the quarantine, once, and nothing crashes."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pear_data.cli.entry import run
from pear_data.config import IngestSettings
from pear_data.corpus.records import parse_object
from pear_data.errors import PearError, SampleError
from pear_data.progress import Silent
from pear_data.stages.ingest import ingest
from pear_data.store import open_store, writable_store

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
FIRST = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}

quick = settings(
    max_examples=settings.default.max_examples // 3,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML
    ).save_pretrained(folder)
    return str(folder)


# JSON that people could have meant, JSON that nobody could, and bytes.
text = st.text(st.characters(exclude_categories=[]), max_size=12) | st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "\x00", "\ufeff", "\ud800", " "]
)
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
anything = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=8
)
turn = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", "gpt"]) | anything,
        "content": text | anything,
    },
    optional={"tool_calls": anything, "reasoning_content": anything, "from": anything, "value": anything},
)
row = st.fixed_dictionaries(
    {"messages": st.lists(turn, max_size=4) | anything},
    optional=dict.fromkeys(
        ("tools", "system", "history", "id", "input_ids", "loss_mask", "labels"), anything
    ),
)
json_line = (row | anything).map(lambda value: json.dumps(value).encode())
mangled = st.builds(
    lambda line, at, byte: line[: at % (len(line) + 1)] + byte + line[at % (len(line) + 1) :],
    json_line,
    st.integers(0, 10_000),
    st.binary(max_size=3),
)
line = (json_line | mangled | st.binary(max_size=40)).map(lambda raw: raw.replace(b"\n", b" "))


def ingested(path, tokenizer, **options):
    """Place -> sample or reason of every row of a file, given to the real stage."""
    with tempfile.TemporaryDirectory() as folder:
        given = IngestSettings(corpus=[str(path)], tokenizer=tokenizer, id_field=":row", **options)
        with writable_store(Path(folder) / "store", create=True) as store:
            ingest(store, given, Silent())
        opened = open_store(Path(folder) / "store")
        ends = {}
        for shard in opened.stage("corpus").shards:
            assert shard.rows > 0
            for sample in pq.read_table(opened.file(shard.file)).to_pylist():
                number = int(sample["sample_id"].rpartition(":")[2])
                assert number not in ends
                assert sample["num_scored"] > 0
                ends[number] = json.loads(sample["record"])
            if shard.quarantine:
                for rejected in pq.read_table(opened.file(shard.quarantine)).to_pylist():
                    assert rejected["row"] not in ends
                    assert rejected["reason"]
                    ends[rejected["row"]] = (rejected["reason"], rejected["raw"])
        return ends


@quick
@given(
    lines=st.lists(line, max_size=12), shard_tokens=st.sampled_from([1, 60, 1_000_000]), packed=st.booleans()
)
def test_no_line_is_lost(tmp_path, tokenizer, lines, shard_tokens, packed):
    lines = [json.dumps(FIRST).encode(), *lines]
    path = tmp_path / "hostile.jsonl"
    path.write_bytes((gzip.compress if packed else bytes)(b"\n".join(lines)))
    ends = ingested(path, tokenizer, shard_tokens=shard_tokens)
    blank = {number for number, raw in enumerate(lines, 1) if not raw.strip(b" \t\r\n")}
    assert ends.keys() == set(range(1, len(lines) + 1)) - blank
    for number, end in ends.items():
        raw = lines[number - 1]
        if isinstance(end, tuple):
            assert end[1] == raw.removesuffix(b"\r")
        else:
            assert end == json.loads(raw)


@quick
@given(
    rows=st.lists(
        st.fixed_dictionaries({"prompt": st.none() | text, "completion": st.none() | text}), max_size=12
    )
)
def test_no_row_of_a_table_is_lost(tmp_path, tokenizer, rows):
    rows = [{"prompt": "q", "completion": "a"}, *rows]
    columns = {
        name: [None if row[name] is None else row[name].encode("utf-8", "surrogatepass") for row in rows]
        for name in ("prompt", "completion")
    }
    arrays = [
        pa.Array.from_buffers(pa.string(), len(rows), pa.array(column, pa.binary()).buffers())
        for column in columns.values()
    ]
    path = tmp_path / "hostile.parquet"
    pq.write_table(pa.table(arrays, names=list(columns)), path)
    ends = ingested(path, tokenizer)
    assert ends.keys() == set(range(1, len(rows) + 1))
    for number, end in ends.items():
        if not isinstance(end, tuple):
            assert end == rows[number - 1]


@quick
@given(
    raw=st.binary(max_size=200),
    magic=st.sampled_from(
        [b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b""]
    ),
)
def test_a_file_of_any_bytes_is_read_or_refused_in_one_line(tmp_path, tokenizer, raw, magic):
    path = tmp_path / "hostile"
    path.write_bytes(magic + raw)
    with pytest.raises(PearError) as caught:
        ingested(path, tokenizer)
    assert "\n" not in str(caught.value)


WHOLE = [{**FIRST, "id": str(n), "n": n, "text": "é" * n} for n in range(20)]


def table_bytes(kind):
    """A small table as Parquet or as an Arrow stream or file, packed or not."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(WHOLE)
    if kind.startswith("parquet"):
        pq.write_table(table, sink, compression=kind.partition(" ")[2], row_group_size=7)
    else:
        opened = pa.ipc.new_stream if kind.startswith("stream") else pa.ipc.new_file
        packed = pa.ipc.IpcWriteOptions(compression="zstd" if kind.endswith("zstd") else None)
        with opened(sink, table.schema, options=packed) as writer:
            writer.write_table(table, max_chunksize=7)
    return sink.getvalue().to_pybytes()


TABLES = {
    kind: table_bytes(kind)
    for kind in ("parquet none", "parquet zstd", "stream", "stream zstd", "file", "file zstd")
}


@quick
@given(
    kind=st.sampled_from(sorted(TABLES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
    kept=st.just(1.0) | st.floats(0.1, 1),
)
def test_a_damaged_table_is_read_or_refused_in_one_line(tmp_path, tokenizer, kind, flips, kept):
    content = bytearray(TABLES[kind])
    for share, change in flips:
        content[int(share * len(content))] ^= change
    path = tmp_path / "damaged"
    path.write_bytes(content[: max(8, int(kept * len(content)))])
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            code = run(["ingest", str(path), "--tokenizer", tokenizer, "--store", str(store)])
        last = told.getvalue().splitlines()[-1]
        assert code in (0, 1, 2, 3)
        assert "unexpected" not in last
        assert last.startswith("corpus: " if code in (0, 3) else "Error: ")
        if code in (0, 3):
            stage = open_store(store).stage("corpus")
            assert stage.decisions["counts"]["rows read"] == stage.rows + stage.quarantined


@given(raw=st.binary(max_size=60) | mangled)
def test_a_line_is_strict_json_or_refused(raw):
    try:
        fields, kept = parse_object(raw)
    except SampleError as error:
        reason = str(error)
    else:
        json.dumps(fields, ensure_ascii=False).encode()
        assert json.loads(kept) == json.loads(raw)
        reason = "none"
    assert reason
    assert "\n" not in reason
