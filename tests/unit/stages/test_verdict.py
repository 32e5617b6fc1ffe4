"""What the report says first: the worst fault before the others, and commands that make the weights they promise."""

from __future__ import annotations

import shlex

import pytest
import yaml

from pear_data.cli.options import build
from pear_data.cli.weight import command as weight_command
from pear_data.config import WeightSettings
from pear_data.stages.findings import Finding
from pear_data.stages.remedies import Remedy
from pear_data.stages.statistics import WeightingStatistics
from pear_data.stages.verdict import SOURCES_FILE, advice, command


def finding(value, threshold, fault="It is wrong.", remedies=None):
    return Finding.of(
        "code", value, threshold, fault, remedies or [Remedy(options=[], text="another corpus")]
    )


def weighting(name, *found, **settings):
    return WeightingStatistics.model_construct(
        weights=name, settings=WeightSettings(name=name, **settings), findings=list(found)
    )


def made_by(line):
    """The settings that a command line makes weights with, read as the command line reads it."""
    words = shlex.split(line)
    assert words[:2] == ["pear-data", "weight"]
    values = weight_command.make_context("weight", words[2:]).params
    (values["level"],) = values.pop("levels")
    return build(WeightSettings, {key: values[key] for key in WeightSettings.model_fields})


def test_the_worst_comes_first_and_the_first_weighting_before_others():
    mild, bad = finding(0.6, 0.5, "Mild."), finding(0.001, 0.1, "Bad.")
    worst = finding(0, 1, "Nothing.")
    said = advice([weighting("block", mild, bad), weighting("token", worst, bad)], ["block", "token"])
    assert [one.text for one in said] == ["Bad.", "Mild.", "Nothing."]
    assert said[0].weights == ["block", "token"]
    assert advice([], []) == []


def test_the_remedies_are_not_said_twice():
    remedy = Remedy(options=["--gamma", "1"], text="--gamma 1 (no discount)")
    (one,) = advice([weighting("block", finding(1, 2, "Remedy: is a word too.", [remedy]))], ["block"])
    assert one.text == "Remedy: is a word too."
    assert one.steps[0].text == "no discount"
    assert one.steps[0].command == "pear-data weight --level block --gamma 1.0 --name block-2".replace(
        "1.0", "1"
    )


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, ["--level", "sequence", "--normalize", "corpus"]),
        ({"gamma": 0.123456789012345}, ["--center", "sample", "--clip-log-ratio", "-0.0511", "0.0304"]),
        ({"block_by": "regex", "block_regex": r"\n+ '\"x"}, ["--clip-log-weight", "-3", "3"]),
        ({"block_by": "lines", "block_size": 4}, ["--level", "sequence"]),
        ({"level": "token", "negative_scale": 0.5, "target": "other"}, ["--gamma", "1"]),
        ({"clip_log_ratio": (-1e-7, 1e3)}, ["--normalize", "sample"]),
    ],
)
def test_a_command_makes_the_weights_again_with_the_remedy_in(settings, options):
    before = WeightSettings(name="mine", **settings)
    made = made_by(command(before, "mine", Remedy(options=options, text=""), ["mine", "MINE-2"]))
    assert made.name == "mine-3"
    flags = [part[2:].replace("-", "_") for part in options if part.startswith("--")]
    after = made.model_dump()
    for name, value in before.model_dump().items():
        if name not in ("name", *flags) and (made.level == "block" or not name.startswith("block")):
            assert after[name] == value
    for flag in flags:
        at = options.index(f"--{flag.replace('_', '-')}") + 1
        wanted = options[at : at + 2] if flag.startswith("clip") else options[at]
        shown = [f"{bound:g}" for bound in after[flag]] if flag.startswith("clip") else after[flag]
        assert shown == wanted or float(wanted) == shown


def test_a_long_name_does_not_hide_what_is_wrong():
    name = "x" * 10_000
    found = Finding.of("code", 1, 2, f"In 1 of 2 sources ({name}): it is wrong.", [], [name])
    (one,) = advice([weighting("block", found)], ["block"])
    assert one.text == f"In 1 of 2 sources ({'x' * 80}… (10,000 characters)): it is wrong."


def test_no_command_where_none_would_work():
    own = WeightSettings(per_source={"a": {"gamma": 0.5}})
    gamma = Remedy(options=["--gamma", "1"], text="--gamma 1")
    # Nobody knows what the user calls the file.
    assert command(own, "block", gamma, []) is None
    # A weight for the whole sample, of mean 1 over the sample, is 1.
    normalized = WeightSettings(normalize="sample")
    assert command(normalized, "block", Remedy(options=["--level", "sequence"], text=""), []) is None
    assert command(WeightSettings(), "block", Remedy(options=[], text="a nearer policy"), []) is None


def test_a_file_of_sources_goes_with_its_command():
    file = yaml.safe_dump({"a b": {"clip_log_ratio": [-0.01, 0.02]}})
    remedy = Remedy(
        options=["--per-source", "FILE"], text="--per-source FILE (smaller; FILE below)", file=file
    )
    (one,) = advice([weighting("block", finding(1, 2, remedies=[remedy]))], ["block"])
    (step,) = one.steps
    assert step.command == f"pear-data weight --level block --per-source {SOURCES_FILE} --name block-2"
    assert step.text == f"smaller; {SOURCES_FILE} below"
    assert step.file == file
