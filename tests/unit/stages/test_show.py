"""One sample in the terminal: every token once, coloured only where there are colours, harmless."""

from __future__ import annotations

import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pear_data.cli.entry import run
from pear_data.config import WeightSettings
from pear_data.errors import MismatchError, UsageError
from pear_data.progress import Silent
from pear_data.schema import VOCABULARY
from pear_data.stages.show import show
from pear_data.stages.text import one_line, printable
from pear_data.stages.weight import weight
from pear_data.store import open_store, writable_store


@pytest.fixture
def folder(make_store, samples):
    samples[1].label = -1
    samples[2].initial_status = "too_long"
    folder = make_store(samples)
    with writable_store(folder) as store:
        weight(store, WeightSettings(level="token"), Silent())
    return folder


def shown(folder, sample_id, *, colours=False, **options):
    file = io.StringIO()
    console = Console(
        file=file,
        markup=False,
        highlight=False,
        width=1000,
        force_terminal=colours,
        color_system="truecolor" if colours else None,
    )
    show(open_store(folder), sample_id, options.pop("name", None), console, **options)
    return file.getvalue()


def test_weights_of_other_log_probs_are_refused(folder):
    with writable_store(folder) as store:
        store.stage("weights/token").shards[1].inputs["scores/initial"] = "0" * 64
        store.save()
    with pytest.raises(MismatchError, match="weights/token .* was not made from the present scores/initial"):
        shown(folder, "s0")


def test_plain_text_where_there_is_no_terminal(folder, samples):
    text, summary = shown(folder, "s0").splitlines()
    assert text == "".join(f" t{token}" for token in samples[0].input_ids)
    row = open_store(folder).weights["token"].to_table().to_pylist()[0]
    assert summary.startswith(
        f"s0 (even); {len(samples[0].input_ids)} tokens, {row['num_scored']} scored; token weights"
    )
    assert f"mean {row['weight_mean']:.3g}, {row['weight_min']:.3g} to {row['weight_max']:.3g}" in summary
    assert f"ESS {row['ess'] / row['num_scored']:.0%}" in summary


def test_scored_tokens_have_a_background_and_the_prompt_has_none(folder, samples):
    text = shown(folder, "s0", colours=True).splitlines()[0]
    painted = re.findall(r"\x1b\[38;2;[\d;]*48;2;[\d;]*m( t\d+)", text)
    dim = re.findall(r"\x1b\[2m( t\d+)", text)
    mask = samples[0].loss_mask
    assert painted == [f" t{token}" for token in samples[0].input_ids[mask]]
    assert dim == [f" t{token}" for token in samples[0].input_ids[~mask]]


def test_table_has_a_row_for_each_scored_token(folder, samples):
    lines = [line for line in shown(folder, "s0", table=True).splitlines() if line.startswith("│")]
    positions = np.flatnonzero(samples[0].loss_mask)
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert [int(row[1]) for row in cells] == positions.tolist()
    log_ratios = samples[0].initial.astype(float) - samples[0].behavior
    assert [row[3] for row in cells] == [f"{value:+.4f}" for value in log_ratios]
    assert cells[-1][4] == "1"


def test_samples_without_weights_say_why(folder):
    assert "token weights: dropped" in shown(folder, "s1")
    assert "negative" in shown(folder, "s1")
    assert "token weights: unscored" in shown(folder, "s2", table=True)
    assert "token weights: unscored" in shown(folder, "s2", colours=True)


def test_text_that_steers_a_terminal_is_harmless(folder):
    with writable_store(folder) as store:
        path = folder / "tokenizer" / "vocabulary.parquet"
        texts = [f"[red]\x1b[2J\x1b]0;x\x07\x9b1m\u202e{index}\n" for index in range(50)]
        pq.write_table(pa.table([range(50), texts], schema=VOCABULARY), path)
        store.manifest.tokenizer.vocabulary = store.entry_of(path)
        store.save()
    for options in ({}, {"table": True}):
        text = shown(folder, "s0", **options)
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}
        assert "[red]" in text
    painted = re.sub(r"\x1b\[[\d;]*m", "", shown(folder, "s0", colours=True))
    assert not set(painted) & {"\x1b", "\x07", "\x9b", "\u202e"}


def test_unknown_samples_and_weightings(folder):
    with pytest.raises(UsageError, match="no sample 'nope'"):
        shown(folder, "nope")
    with pytest.raises(UsageError, match="weights/block.*have: token"):
        shown(folder, "s0", name="block")
    with pytest.raises(UsageError, match="no sample"):
        shown(folder, "s0' or '1'='1")


def test_command_line(folder, capsys):
    assert run(["show", "s0", "--store", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("s0 (even);")
    assert run(["show", "nope", "--store", str(folder)]) == 2


def test_no_weights_yet(make_store, samples):
    with pytest.raises(UsageError, match="no weights yet"):
        shown(make_store(samples), "s0")


def test_printable_keeps_what_people_read():
    assert printable("a\tb\nc é 漢 🙂") == "a\tb\nc é 漢 🙂"
    assert one_line("a\tb\nc") == "a→b⏎c"
    assert printable("".join(map(chr, [*range(32), *range(127, 160), 0xFEFF, 0x200B, 0x2066]))) == "\t\n"
