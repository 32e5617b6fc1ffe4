"""Corpora and a tokenizer of bytes, whose ids a test can work out itself."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}"
    "{{ '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{%- endif %}"
    "{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{%- endfor %}"
    "{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Reasoning is dropped from all turns but the last, as Qwen3's and R1's templates do.
REWRITING = CHATML.replace(
    "{%- if message.reasoning_content %}", "{%- if loop.last and message.reasoning_content %}"
)


def save_tokenizer(folder, template=CHATML):
    """A tokenizer of single bytes and two control tokens, saved."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


class KilledError(Exception):
    """Stands for the end of the process."""


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def examples(count, start=0):
    return [
        {"messages": chat(("user", f"question {i}"), ("assistant", f"answer {i} é\U0001f600" * (i % 4 + 1)))}
        for i in range(start, start + count)
    ]


def rendered(messages, before=""):
    """Pieces of the rendered conversation with whether they are scored: each assistant turn, its end included."""
    pieces = [(before, False)]
    for message in messages:
        scored = message["role"] == "assistant"
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", scored))
        pieces.append(("\n", False))
    return pieces


def expected_tokens(pieces, folder):
    """Ids and mask of pieces; as every byte is a token, pieces can be tokenized apart."""
    backend = AutoTokenizer.from_pretrained(folder)
    ids, mask = [], []
    for text, scored in pieces:
        piece = backend(text, add_special_tokens=False)["input_ids"]
        ids += piece
        mask += [scored] * len(piece)
    return ids, mask


TURNS = chat(("user", "q"), ("assistant", "a"))


def mixed_corpus(tmp_path):
    """Two files of several shards, with rejected rows, blank lines and a tail of rejected rows."""
    a, b = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    lines = write_lines(a, examples(30)).read_bytes().splitlines(keepends=True)
    lines[3:3] = [b"bad\n", b"\n"]
    a.write_bytes(b"".join(lines) + b"\nbad\n[]\n")
    rows = examples(30, start=30)
    rows[7] = {"messages": [{"role": "who", "content": "?"}]}
    rows[29] = {"messages": []}
    pq.write_table(pa.Table.from_pylist(rows), b, row_group_size=9)
    return a, b
