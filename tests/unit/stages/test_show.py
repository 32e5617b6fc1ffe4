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
from pear_data.schema import QUARANTINE, VOCABULARY
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


def weights_in(folder, name):
    """Weights of each sample of a weighting, in float64."""
    rows = open_store(folder).weights[name].to_table().to_pylist()
    return {row["sample_id"]: np.array(row["weights"], float) for row in rows if row["weights"] is not None}


def table_of(text):
    """Heading and rows of a printed table."""
    heading = next(line for line in text.splitlines() if line.startswith("┃"))
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return (
        [cell.strip() for cell in heading.strip("┃").split("┃")],
        [[cell.strip() for cell in line.strip("│").split("│")] for line in lines],
    )


def test_weights_of_other_log_probs_are_refused(folder):
    with writable_store(folder) as store:
        store.stage("weights/token").shards[1].inputs["scores/initial"] = "0" * 64
        store.save()
    with pytest.raises(MismatchError, match="weights/token .* was not made from the present scores/initial"):
        shown(folder, "s0")


def test_plain_text_where_there_is_no_terminal(folder, samples):
    text, summary = shown(folder, "s0").splitlines()
    assert text == "".join(f" t{token}" for token in samples[0].input_ids)
    weights = weights_in(folder, "token")["s0"]
    assert summary.startswith(
        f"s0 (even); {len(samples[0].input_ids)} tokens, {len(weights)} scored; token weights"
    )
    assert f"mean {weights.mean():.3g}, {weights.min():.3g} to {weights.max():.3g}" in summary
    assert f"ESS {weights.sum() ** 2 / (weights**2).sum() / len(weights):.0%}" in summary


def test_scored_tokens_have_a_background_and_the_prompt_has_none(folder, samples):
    text = shown(folder, "s0", colours=True).splitlines()[0]
    painted = re.findall(r"\x1b\[38;2;[\d;]*48;2;[\d;]*m( t\d+)", text)
    dim = re.findall(r"\x1b\[2m( t\d+)", text)
    mask = samples[0].loss_mask
    assert painted == [f" t{token}" for token in samples[0].input_ids[mask]]
    assert dim == [f" t{token}" for token in samples[0].input_ids[~mask]]


def test_table_has_a_row_for_each_scored_token(folder, samples):
    heading, cells = table_of(shown(folder, "s0", table=True))
    assert heading == ["t", "position", "token", "log-ratio", "token"]
    positions = np.flatnonzero(samples[0].loss_mask)
    assert [int(row[1]) for row in cells] == positions.tolist()
    log_ratios = samples[0].initial.astype(float) - samples[0].behavior
    assert [row[3] for row in cells] == [marked(value, -0.08, 0.3) for value in log_ratios]
    assert {row[3][-1] for row in cells} >= {"↓", "↑"}
    assert cells[-1][4] == "1"


def marked(log_ratio, low, high, center=0.0):
    """A log-ratio as the table prints it."""
    mark = " ↓" if log_ratio - center < low else " ↑" if log_ratio - center > high else ""
    return f"{log_ratio:+.4f}{mark}"


def test_the_table_holds_every_weighting_the_default_first(folder):
    with writable_store(folder) as store:
        for level in ("uniform", "block", "sequence"):
            weight(store, WeightSettings(level=level), Silent())
    for name, order in ((None, "block token uniform sequence"), ("uniform", "uniform token block sequence")):
        heading, cells = table_of(shown(folder, "s0", table=True, name=name))
        assert heading[4:] == order.split()
        for column, weighting in enumerate(heading[4:], start=4):
            assert [row[column] for row in cells] == [f"{w:.4g}" for w in weights_in(folder, weighting)["s0"]]
    # A baseline clips nothing.
    assert not {"↓", "↑"} & set("".join(row[3] for row in cells))
    _, cells = table_of(shown(folder, "s2", table=True))
    assert {(row[3], *row[4:]) for row in cells} == {("", "-", "-", "-", "-")}


@pytest.mark.parametrize("whose", ["sample", "corpus"])
def test_clip_marks_are_of_centered_log_ratios(folder, samples, whose):
    with writable_store(folder) as store:
        chosen = WeightSettings(name="c", center=whose, per_source={"odd": {"clip_log_ratio": (-0.5, 0.01)}})
        weight(store, chosen, Silent())
    log_ratios = {s.sample_id: s.initial.astype(float) - s.behavior for s in samples}
    scored = [s.sample_id for s in samples if s.initial_status == "ok" and s.label > 0]
    corpus_mean = np.concatenate([log_ratios[sample_id] for sample_id in scored]).mean()
    for sample_id, clips in (("s0", (-0.08, 0.3)), ("s4", (-0.5, 0.01))):
        center = log_ratios[sample_id].mean() if whose == "sample" else corpus_mean
        text = shown(folder, sample_id, table=True, name="c")
        _, cells = table_of(text)
        assert [row[3] for row in cells] == [marked(v, *clips, center) for v in log_ratios[sample_id]]
        assert f"once the mean of the {whose} is subtracted" in text


def test_weightings_of_other_log_probs_are_left_out_of_the_table(folder):
    with writable_store(folder) as store:
        weight(store, WeightSettings(level="block"), Silent())
        store.stage("weights/token").shards[1].inputs["scores/initial"] = "0" * 64
        store.save()
    text = shown(folder, "s0", table=True)
    assert table_of(text)[0][4:] == ["block"]
    assert "left out, since made from other log-probs: token" in text


def test_samples_without_weights_say_why(folder):
    assert "token weights: dropped: it is a negative, and --negative-scale was 0" in shown(folder, "s1")
    why = "token weights: unscored: initial: too_long (longer than the policy's model or --max-length takes)"
    for options in ({}, {"table": True}, {"colours": True}):
        assert shown(folder, "s2", **options).rstrip().endswith(why)


def test_the_reason_of_a_failed_sample_is_that_of_the_quarantine(make_store, samples):
    samples[9].initial_status = "failed"
    samples[9].behavior_status = "nonfinite"
    folder = make_store(samples)
    with writable_store(folder) as store:
        path = folder / "quarantine" / "scores-initial-part-00001.parquet"
        path.parent.mkdir()
        # Two rows of the second shard, of which the other is not asked for.
        reasons = ["another", "the engine was killed (SIGKILL)\x1b[2J\nwhile scoring it"]
        columns = [["part-00001.parquet"] * 2, [0, 2], reasons, [b"{}", b"{}"]]
        pq.write_table(pa.table(columns, schema=QUARANTINE), path)
        shard = store.stage("scores/initial").shards[1]
        shard.quarantine, shard.quarantined = store.entry_of(path), 2
        store.save()
        weight(store, WeightSettings(level="token"), Silent())
    assert shown(folder, "s9").endswith(
        "token weights: unscored: initial: failed (the engine was killed (SIGKILL)[2J⏎while scoring it);"
        " behavior: nonfinite (log-probs that are not finite)\n"
    )
    path.unlink()
    with pytest.raises(MismatchError, match="is missing"):
        shown(folder, "s9")


def test_negatives_are_coloured_by_the_size_of_their_weights(make_store, samples):
    for sample in samples[:2]:
        sample.label = -1
    samples[0].initial = samples[0].behavior - 0.01
    samples[1].initial = samples[1].behavior + 0.02
    folder = make_store(samples)
    with writable_store(folder) as store:
        weight(store, WeightSettings(level="token", negative_scale=1.0), Silent())
    below, above = (
        set(re.findall(r"48;2;([\d;]*)m t", shown(folder, sample_id, colours=True).splitlines()[0]))
        for sample_id in ("s0", "s1")
    )
    assert "negative" in shown(folder, "s0")
    assert len(below) == len(above) == 1
    assert below != above


def test_a_corpus_without_a_tokenizer_shows_its_ids(folder, samples):
    with writable_store(folder) as store:
        store.manifest.tokenizer = None
        store.save()
    text = shown(folder, "s0").splitlines()[0]
    assert text == "".join(f"[{token}]" for token in samples[0].input_ids)
    _, cells = table_of(shown(folder, "s0", table=True))
    assert [row[2] for row in cells] == [f"[{t}]" for t in samples[0].input_ids[samples[0].loss_mask]]


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
