"""The store that is kept once per format version, made by commands from recorded log-probs of pre-tokenized samples.

    python tests/contract/golden_store.py tests/contract/stores/vN

Two shards, both policies, three weightings; a negative, a sample without log-probs and a quarantined row among them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pear_data.cli.entry import run

WORDS = 20
WEIGHTINGS = {
    "token": ["--level", "token", "--gamma", "0.99"],
    "block": ["--level", "block", "--block-size", "2"],
    "whole": ["--level", "sequence", "--negative-scale", "0.5", "--name", "whole"],
}


def rows() -> list[dict[str, object]]:
    """The corpus, its recorded log-probs among it."""
    made: list[dict[str, object]] = [
        {
            "id": f"s{index}",
            "source": ["a", "b"][index % 2],
            "label": -1 if index == 4 else 1,
            "input_ids": [1, 2, *range(3, 4 + index)],
            "loss_mask": [False, False] + [True] * (1 + index),
            "initial": [-0.5 - 0.125 * step for step in range(1 + index)],
            "behavior": [-0.75 - 0.0625 * step for step in range(1 + index)],
        }
        for index in range(8)
    ]
    made[5]["behavior"] = None
    made.insert(3, {"id": "no tokens", "source": "a", "label": 1})
    return made


def make(store: Path) -> None:
    """Make the store at `store`, which must not exist. The working directory changes meanwhile: paths are settings."""
    store, before = store.absolute(), Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            _make(store)
        finally:
            os.chdir(before)


def _make(store: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained("tokenizer")
    Path("corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    fields = ["--id-field", "id", "--source-field", "source", "--label-field", "label"]
    _run(
        3, "ingest", "corpus.jsonl", "--tokenizer", "tokenizer", *fields, "--shard-tokens", "25", store=store
    )
    for policy, code in {"initial": 0, "behavior": 3}.items():
        _run(code, "score", "--policy", policy, "--from-field", policy, store=store)
    for options in WEIGHTINGS.values():
        _run(3, "weight", *options, store=store)


def _run(code: int, *arguments: str, store: Path) -> None:
    found = run([*arguments, "--store", str(store)])
    assert found == code, f"{arguments} ended with {found}"


if __name__ == "__main__":
    make(Path(sys.argv[1]))
