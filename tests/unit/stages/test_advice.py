"""Following the advice: each option that a finding names, given to `pear-data weight`, mends what the finding says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import yaml

from pear_data.cli.entry import run
from pear_data.stages.noise import DECISION
from pear_data.store import writable_store
from pear_data.store.manifest import fingerprint

# Code of a finding: the number behind it, and whether it must not be less (1) or not be more (-1) than its threshold.
NUMBERS = {
    "low_ess": (lambda group: group["ess_ratio"], 1),
    "few_sequences": (lambda group: group["seq_ess_ratio"], 1),
    "clipped_low": (lambda group: group["log_ratio_clipped_low"], -1),
    "clipped_high": (lambda group: group["log_ratio_clipped_high"], -1),
    "saturated": (lambda group: group["saturated"], -1),
    "decays_with_position": (lambda group: group["weight_by_decile"][0] / group["weight_by_decile"][-1], 1),
    "top_heavy": (lambda group: group["top_1pct_mass"], -1),
    "weight_mean": (lambda group: min(group["weight_mean"], 1 / group["weight_mean"]), 1),
}


def teacher(random, length):
    """Far more confident than the initial policy: its log-probs are near 0, the target's -1 to -3."""
    return random.uniform(-3, -1, length), -random.exponential(0.001, length)


def skewed(random, length):
    """As language has it: most tokens are near certain, some are far less likely for the target."""
    unlikely = random.random(length) < 0.4
    target = -np.where(unlikely, random.exponential(2, length), random.exponential(0.2, length))
    return target, -random.exponential(0.05, length)


def uneven(random, length):
    """Samples that differ in how far apart the policies are on them."""
    return -random.uniform(0.1, 3) * random.exponential(1, length), -random.exponential(0.01, length)


def likelier(random, length):
    """The target finds the text likelier than the policy that is said to have written it."""
    target = -random.exponential(0.1, length)
    return target, target - np.abs(random.normal(0.6, 0.3, length))


def near(random, length):
    target = -random.exponential(0.5, length)
    return target, target + random.normal(0, 0.02, length)


def outliers(random, length):
    """One sample in a hundred grows, the others fade."""
    target = -random.exponential(0.5, length)
    return target, target - (0.3 if random.random() < 0.01 else -0.05)


def apart(random, length):
    """Samples whose sums of log-ratios differ by far more than e."""
    target = -random.exponential(0.5, length)
    return target, target - random.normal(random.normal(-0.03, 0.035), 0.02, length)


def lengths_of(random, count, median):
    return np.clip(random.lognormal(np.log(median), 0.6, count), 20, 20 * median).astype(int)


def build(samples, pairs):
    return [
        dataclasses.replace(
            samples[0],
            sample_id=f"a{index}",
            input_ids=np.zeros(len(target) + 1, dtype=np.int32),
            loss_mask=np.arange(len(target) + 1) > 0,
            initial=target.astype(np.float32),
            behavior=behavior.astype(np.float32),
        )
        for index, (target, behavior) in enumerate(pairs)
    ]


def of_kind(kind, count, median, seed=0):
    random = np.random.default_rng(seed)
    return [kind(random, length) for length in lengths_of(random, count, median)]


def stats(folder, name, capsys):
    capsys.readouterr()
    assert run(["stats", "--store", str(folder), "--weights", name, "--format", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    return found


def weigh(folder, name, options):
    assert run(["weight", "--store", str(folder), "--name", name, "--overwrite", *options]) == 0


def groups_of(found, finding):
    by_name = {group["source"]: group for group in found["sources"]}
    return [by_name[name] for name in finding["sources"]] or [found["corpus"]]


def options_of(remedy, folder):
    """The options of a remedy, FILE written where they name it."""
    if remedy["file"] is None:
        assert "FILE" not in remedy["options"]
        return remedy["options"]
    path = folder.parent / "per_source.yaml"
    path.write_text(remedy["file"], encoding="utf-8")
    return [str(path) if option == "FILE" else option for option in remedy["options"]]


def given(options, instead):
    """`options` with those of a remedy in their place."""
    flags = {option for option in instead if option.startswith("--")}
    kept, keep = [], True
    for option in options:
        if option.startswith("--"):
            keep = option not in flags
        if keep:
            kept.append(option)
    return [*kept, *instead]


def check_mended(found, finding):
    """The finding is gone, of every source it named, and its number is on the right side."""
    still = [other for other in found["findings"] if other["code"] == finding["code"]]
    assert not any(
        not other["sources"] or not finding["sources"] or set(other["sources"]) & set(finding["sources"])
        for other in still
    )
    if finding["code"] in NUMBERS:
        number, sign = NUMBERS[finding["code"]]
        for group in groups_of(found, finding):
            assert sign * number(group) >= sign * min(finding["threshold"], 1 / finding["threshold"])


# Name: kind of sample, how many, their median length, options of the first weighting, findings it must have.
CASES = {
    "teacher": (teacher, 56, 400, [], "low_ess clipped_low saturated decays_with_position weight_mean"),
    "teacher, token": (teacher, 56, 400, ["--level", "token"], "low_ess clipped_low decays_with_position"),
    "teacher, sequence": (teacher, 56, 300, ["--level", "sequence"], "clipped_low saturated weight_mean"),
    "teacher, normalized": (teacher, 56, 400, ["--normalize", "corpus"], "low_ess decays_with_position"),
    "teacher, centered": (teacher, 56, 400, ["--center", "corpus"], "saturated weight_mean"),
    "skewed": (skewed, 56, 500, [], "low_ess clipped_low saturated decays_with_position"),
    "uneven": (uneven, 56, 300, [], "low_ess clipped_low saturated decays_with_position"),
    "likelier": (likelier, 42, 400, [], "clipped_high saturated weight_mean"),
    "discount": (near, 42, 400, ["--gamma", "0.97"], "decays_with_position saturated"),
    "apart": (apart, 105, 100, [], "low_ess few_sequences"),
    "apart, sequence": (apart, 105, 100, ["--level", "sequence"], "few_sequences"),
    "outliers": (outliers, 112, 120, ["--gamma", "1"], "low_ess few_sequences top_heavy"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_remedy_mends_its_finding(make_store, samples, capsys, case):
    kind, count, median, options, expected = CASES[case]
    folder = make_store(build(samples, of_kind(kind, count, median)))
    weigh(folder, "first", options)
    found = stats(folder, "first", capsys)
    codes = {finding["code"] for finding in found["findings"]}
    assert set(expected.split()) <= codes, codes
    follow_each(found, folder, options, capsys)


def follow_each(found, folder, options, capsys):
    """Weigh again with every remedy that names options, and check its finding; weightings are made once."""
    mended = {}
    for finding in found["findings"]:
        for remedy in finding["remedies"]:
            chosen = tuple(options_of(remedy, folder))
            if chosen and (chosen, remedy["file"]) not in mended:
                weigh(folder, "mended", given(options, chosen))
                mended[chosen, remedy["file"]] = stats(folder, "mended", capsys)
            if chosen:
                check_mended(mended[chosen, remedy["file"]], finding)


def test_the_cases_cover_every_code_that_names_options():
    assert {code for *_, codes in CASES.values() for code in codes.split()} == NUMBERS.keys()


@pytest.mark.parametrize("kind", [teacher, skewed, uneven])
def test_the_first_remedy_of_a_collapse_mends_all_of_it(make_store, samples, capsys, kind):
    folder = make_store(build(samples, of_kind(kind, 105, 400)))
    weigh(folder, "block", [])
    found = stats(folder, "block", capsys)
    collapse = found["findings"][0]
    assert collapse["code"] == "low_ess"
    assert all(option in collapse["text"] for option in collapse["remedies"][0]["options"])
    weigh(folder, "mended", collapse["remedies"][0]["options"])
    mended = stats(folder, "mended", capsys)
    for finding in found["findings"]:
        check_mended(mended, finding)
    assert mended["findings"] == []
    assert 0.3 < mended["corpus"]["weight_mean"] < 3


def test_a_source_that_collapses_is_mended_alone(make_store, samples, capsys):
    random = np.random.default_rng(0)
    # Row groups of three in shards of seven: the middle row of each is "odd".
    pairs = [
        (teacher if index % 7 in (1, 4) else near)(random, int(random.integers(200, 500)))
        for index in range(105)
    ]
    folder = make_store(build(samples, pairs))
    weigh(folder, "block", [])
    found = stats(folder, "block", capsys)
    told = {finding["code"]: finding for finding in found["findings"]}
    for code in ("low_ess", "clipped_low", "decays_with_position"):
        assert told[code]["sources"] == ["odd"]
        assert told[code]["text"].startswith("In 1 of 2 sources (odd): ")
        assert "--per-source FILE" in told[code]["text"]
    follow_each(found, folder, [], capsys)
    first = told["low_ess"]["remedies"][0]
    assert first["options"] == ["--per-source", "FILE"]
    weigh(folder, "mended", options_of(first, folder))
    healthy, same = (stats(folder, name, capsys)["sources"][0] for name in ("block", "mended"))
    assert healthy["source"] == "even"
    assert healthy == same


def test_sources_with_settings_of_their_own_keep_what_mends_nothing(make_store, samples, capsys):
    folder = make_store(build(samples, of_kind(teacher, 42, 400)))
    own = folder.parent / "own.yaml"
    own.write_text("odd: {clip_log_ratio: [-0.1, 0.2], clip_log_weight: [-9, 4]}\n", encoding="utf-8")
    options = ["--per-source", str(own)]
    weigh(folder, "own", options)
    found = stats(folder, "own", capsys)
    first = found["findings"][0]["remedies"][0]
    assert first["options"] == ["--center", "sample", "--per-source", "FILE"]
    file = yaml.safe_load(first["file"])
    assert file["odd"]["clip_log_weight"] == [-9, 4]
    assert file["odd"]["clip_log_ratio"] != [-0.1, 0.2]
    follow_each(found, folder, options, capsys)


def audited(p99):
    sizes = {"median": p99 / 3, "p99": p99, "max": 3 * p99, "mean": p99 / 2, "bias": 0.0}
    where = {"samples": 1, "tokens": 9, "max_sample_id": "s", "max_position": 1, "reference": "r"}
    return {DECISION: {**sizes, **where, "clip_log_ratio": [-0.08, 0.3]}}


@pytest.mark.parametrize("noise", [None, 0.03, 0.2])
def test_wider_clips_stand_out_of_the_noise(make_store, samples, capsys, noise):
    folder = make_store(build(samples, of_kind(near, 30, 50)))
    with writable_store(folder) as store:
        initial = store.manifest.stages["scores/initial"]
        if noise is None:
            initial.settings["dtype"] = "bfloat16"
            initial.fingerprint = fingerprint(initial.settings)
        else:
            initial.decisions = audited(noise)
        store.save()
    weigh(folder, "block", [])
    found = stats(folder, "block", capsys)
    assert [finding["code"] for finding in found["findings"]] == ["noise_floor"]
    assert any(remedy["options"] for remedy in found["findings"][0]["remedies"])
    follow_each(found, folder, [], capsys)


def test_what_is_in_use_is_not_proposed(make_store, samples, capsys):
    folder = make_store(build(samples, of_kind(teacher, 56, 400)))
    weigh(folder, "block", [])
    balance = stats(folder, "block", capsys)["findings"][0]["remedies"][0]["options"]
    narrow = [*balance, "--clip-log-weight", "-0.01", "0.01"]
    weigh(folder, "narrow", narrow)
    (finding,) = stats(folder, "narrow", capsys)["findings"]
    assert finding["code"] == "saturated"
    assert balance not in [remedy["options"] for remedy in finding["remedies"]]
