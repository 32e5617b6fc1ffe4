"""Text from a corpus reaches terminals and reports harmless, by every command that shows it."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pear_data.cli.entry import run

# Control sequences, C1 controls, a link (OSC 8), bidi overrides, zero widths, markup of rich's and of HTML.
NASTY = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[red]x[/red][link=https://example.org]y",
    "\x1b[2J\x1b[31mx",
    "\x1b]8;;https://example.org\x1b\\y\x1b]8;;\x1b\\",
    "\x9b31mx\x07\x08",
    "a\u202eb\u2066c\u200bd\ufeff",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;'\"`${x}",
    "line\nline\r\ttab",
)
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A store whose ids, sources, tokens, file and rejected rows are all hostile."""
    place = tmp_path_factory.mktemp("hostile")
    words = Tokenizer(
        models.WordLevel({text: index for index, text in enumerate(("w", *NASTY))}, unk_token="w")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w").save_pretrained(place / "tokenizer")
    count = len(NASTY)
    rows = [
        {
            "id": f"{text}{index}",
            "source": text,
            "input_ids": [0, *range(1, count + 1)],
            "loss_mask": [False] + [True] * count,
            "initial": [-0.5 - 0.125 * step for step in range(count)],
            "behavior": [-0.75 - 0.0625 * ((step + index) % count) for step in range(count)],
        }
        for index, text in enumerate(NASTY)
    ]
    rows += [{"id": text, "source": text} for text in NASTY]
    corpus = place / "\x1b[2J<script>[red]\u202e.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = ["--store", str(place / "store")]
    fields = ["--id-field", "id", "--source-field", "source"]
    assert run(["ingest", str(corpus), "--tokenizer", str(place / "tokenizer"), *fields, *store]) == 3
    for policy in ("initial", "behavior"):
        assert run(["score", "--policy", policy, "--from-field", policy, *store]) == 0
    assert run(["weight", "--level", "token", "--level", "block", *store]) == 0
    return place


COMMANDS = (
    ["stats", "--by", "source"],
    ["compare", "token", "block"],
    ["sql", "from samples", "--format", "table"],
    ["sql", "select token, record from tokens join corpus using (sample_id)", "--format", "table"],
    ["sql", f"select '{NASTY[3]}' as \"{NASTY[4]}\"", "--format", "table"],
    ["sql", f'from "{NASTY[3]}"'],
    ["sql", f"select error('{NASTY[6]}')"],
    ["show", f"{NASTY[3]}3"],
    ["show", f"{NASTY[0]}0"],
    ["show", NASTY[5]],
    ["quarantine", "list", "--format", "table"],
    ["status"],
    ["verify"],
    ["weight", "--name", NASTY[3]],
    ["score", "--policy", "x", "--model", NASTY[3]],
    ["ingest", NASTY[4], "--tokenizer", NASTY[5]],
    ["stats", "--weights", NASTY[6]],
    ["export", "OUT", "--where", NASTY[3]],
    ["run", NASTY[3]],
    [NASTY[3]],
    ["verify", NASTY[6]],
)


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_nothing_steers_the_terminal(hostile, command, capfdbinary):
    where = ["--store", str(hostile / "store")] if command[0].isalpha() else []
    capfdbinary.readouterr()
    run([argument.replace("OUT", str(hostile / "out")) for argument in command] + where)
    shown = capfdbinary.readouterr()
    for text in (shown.out.decode(), shown.err.decode()):
        assert not UNSAFE.search(text), UNSAFE.search(text)
    assert shown.out or shown.err
    assert b"report the traceback" not in shown.err


def test_a_report_holds_no_markup_of_the_corpus(hostile, capfd):
    page = hostile / "report.html"
    assert run(["report", "-o", str(page), "--store", str(hostile / "store")]) == 0
    text = page.read_text()
    assert not UNSAFE.search(text), UNSAFE.search(text)
    assert "<script" not in text.lower()
    assert "<img" not in text.lower()
    assert "[red]" in text
    assert "{{ 7 * 7 }}" in text
    assert "Content-Security-Policy\" content=\"default-src 'none'" in text
    assert not re.search(r"(?<!&lt;)\son[a-z]+=", re.sub(r"&lt;.*?&gt;", "", text))
