"""What is said to be wrong, of which sources and in what words; test_advice.py follows the advice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import yaml

from pear_data.config import WeightSettings
from pear_data.progress import Silent
from pear_data.stages import findings
from pear_data.stages.statistics import statistics
from pear_data.stages.weight import weight
from pear_data.store import open_store, writable_store


def add_weights(folder, **settings):
    with writable_store(folder) as store:
        weight(store, WeightSettings(**settings), Silent(), overwrite=True)
    return open_store(folder)


def made_of(samples, count, shift, spread=0.05, length=60):
    """`count` samples of up to `length` scored tokens whose log-ratios are normal(shift, spread), then cut at 0."""
    random = np.random.default_rng(1)
    made = []
    for index in range(count):
        size = int(random.integers(1, length))
        behavior = -random.exponential(0.5, size).astype(np.float32)
        initial = np.minimum(behavior + random.normal(shift, spread, size), 0).astype(np.float32)
        made.append(
            dataclasses.replace(
                samples[0],
                sample_id=f"m{index}",
                input_ids=random.integers(0, 50, size + 1).astype(np.int32),
                loss_mask=np.arange(size + 1) > 0,
                initial=initial,
                behavior=behavior,
            )
        )
    return made


def found_in(store, name):
    return {finding.code: finding for finding in statistics(store, [name])[0].findings}


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_a_healthy_weighting_has_no_findings(make_store, samples, level):
    assert found_in(add_weights(make_store(made_of(samples, 60, -0.01)), level=level), level) == {}


def test_a_collapse_is_said_with_the_numbers_behind_it_and_what_mends_it(make_store, samples):
    found = found_in(add_weights(make_store(made_of(samples, 40, -1.0, 0.3, 600))), "block")
    assert found.keys() == {"low_ess", "clipped_low", "saturated", "decays_with_position", "weight_mean"}
    for finding in found.values():
        assert f"{finding.value:.3g}" in finding.text or f"{100 * finding.value:.3g} %" in finding.text
        assert finding.remedies
        for remedy in finding.remedies:
            assert remedy.text in finding.text
            assert " ".join(remedy.options) in remedy.text
    assert "(median -1.01)" in found["clipped_low"].text
    assert found["clipped_low"].remedies[-1].text == "a behavior policy nearer to the target"
    assert [remedy.options[0] for remedy in found["low_ess"].remedies] == ["--center", "--clip-log-weight"]


def test_sources_that_are_wrong_are_named_with_their_own_clips(make_store, samples):
    near, far = made_of(samples, 60, -0.01), made_of(samples, 60, -2.0, 0.1)
    # Row groups of three in shards of seven: the middle row of each is "odd".
    mixed = [far[i] if i % 7 in (1, 4) else near[i] for i in range(60)]
    folder = make_store(mixed)
    finding = found_in(add_weights(folder), "block")["clipped_low"]
    assert finding.sources == ["odd"]
    assert finding.text.startswith(
        "In 1 of 2 sources (odd): 100 % of the log-ratios lie below the lower clip -0.08"
    )
    per_source = {"odd": {"clip_log_ratio": (-5, 0.3)}}
    assert "clipped_low" not in found_in(add_weights(folder, per_source=per_source, name="own"), "own")


def test_a_fault_of_the_whole_that_some_sources_make_is_laid_to_them(make_store, samples):
    near, far = made_of(samples, 60, -0.01, length=300), made_of(samples, 60, -2.0, 0.1, length=900)
    mixed = [far[i] if i % 7 in (1, 4) else near[i] for i in range(60)]
    finding = found_in(add_weights(make_store(mixed)), "block")["saturated"]
    assert finding.sources == []
    assert "It is so in 1 of 2 sources (odd)." in finding.text
    assert [remedy.options for remedy in finding.remedies] == [
        ["--per-source", "FILE"],
        ["--center", "sample", "--per-source", "FILE"],
    ]
    assert list(yaml.safe_load(finding.remedies[0].file)) == ["odd"]
    assert list(yaml.safe_load(finding.remedies[1].file)) == ["even", "odd"]


def test_of_very_many_sources_the_largest_are_looked_at(make_store, samples, monkeypatch):
    wrong = made_of(samples, 20, -1.0, 0.3, 400)
    store = add_weights(make_store(wrong), level="token")
    monkeypatch.setattr(findings, "MOST_SOURCES", 1)
    found = found_in(store, "token")
    assert found
    assert all(not finding.sources for finding in found.values())  # the largest is as wrong as the whole
    assert len(statistics(store, ["token"])[0].sources) == 2


def test_baselines_are_not_found_fault_with(make_store, samples):
    folder = make_store(made_of(samples, 40, -1.0, 0.3, 600))
    for level in ("uniform", "dft"):
        assert found_in(add_weights(folder, level=level), level) == {}


def test_half_precision_scores_are_told_of(make_store, samples):
    store = add_weights(make_store(made_of(samples, 60, -0.01)))
    store.manifest.stages["scores/initial"].settings["dtype"] = "bfloat16"
    finding = found_in(store, "block")["noise_floor"]
    assert finding.text.startswith("Log-probs of initial were")
    assert finding.remedies[0].text == "scoring again with --dtype float32"
    assert finding.remedies[0].options == []


def noise(p99):
    sizes = {"median": p99 / 3, "p99": p99, "max": 3 * p99, "mean": p99 / 2, "bias": 0.0}
    where = {"samples": 1, "tokens": 9, "max_sample_id": "s", "max_position": 1, "reference": "r"}
    return {"audit": {**sizes, **where, "clip_log_ratio": [-0.08, 0.3]}}


def test_measured_noise_takes_the_place_of_what_half_precision_is_assumed_to_make(make_store, samples):
    store = add_weights(make_store(made_of(samples, 60, -0.01)))
    initial, behavior = (store.manifest.stages[f"scores/{name}"] for name in ("initial", "behavior"))
    initial.settings["dtype"] = behavior.settings["dtype"] = "bfloat16"
    text = found_in(store, "block")["noise_floor"].text
    assert "initial and behavior were computed in half precision" in text

    initial.decisions = noise(0.003)
    text = found_in(store, "block")["noise_floor"].text
    assert text.startswith("Log-probs of behavior were computed in half precision")
    assert "(measured, p99: initial 0.003, behavior not audited)" in text

    behavior.decisions = noise(0.004)  # sqrt(3^2 + 4^2) = 5 thousandths, a quarter of the limit
    assert found_in(store, "block") == {}
    (found,) = statistics(store)
    assert found.audits["behavior"].p99 == 0.004

    initial.decisions = noise(0.03)
    finding = found_in(store, "block")["noise_floor"]
    assert finding.value == pytest.approx(np.hypot(0.03, 0.004))
    assert finding.threshold == pytest.approx(0.02)
    assert "is 0.03 (p99: initial 0.03, behavior 0.004), 37.8 % of the smaller log-ratio clip" in finding.text
    assert finding.remedies[-1].options[0] == "--clip-log-ratio"

    behavior.decisions, behavior.settings["dtype"] = {}, "float32"
    finding = found_in(store, "block")["noise_floor"]
    assert finding.value == 0.03
    assert "behavior not audited" in finding.text
    centered = add_weights(store.path, name="centered", center="sample", clip_log_ratio=(-0.02, 0.02))
    centered.manifest.stages["scores/initial"].decisions = noise(0.03)
    (remedy,) = found_in(centered, "centered")["noise_floor"].remedies
    assert remedy.text == "scoring again with --dtype float32"
    wide = add_weights(store.path, name="wide", clip_log_ratio=(-0.5, 0.5))
    wide.manifest.stages["scores/initial"].decisions = noise(0.03)
    assert found_in(wide, "wide") == {}
