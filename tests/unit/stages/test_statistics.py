"""Every diagnostic against plain float64 numpy over all tokens at once."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from pear_data.cli.entry import run
from pear_data.config import WeightSettings
from pear_data.errors import MismatchError, UsageError
from pear_data.progress import Silent
from pear_data.stages.histogram import RELATIVE_ERROR, Histogram
from pear_data.stages.statistics import QUANTILES, statistics
from pear_data.stages.statistics_text import source_table
from pear_data.stages.weight import weight
from pear_data.store import open_store, writable_store


def add_weights(folder, **settings):
    with writable_store(folder) as store:
        weight(store, WeightSettings(**settings), Silent(), overwrite=True)
    return open_store(folder)


def many(samples, count, shift=-0.05, spread=0.3, length=60):
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


def reference(samples, weights, settings):
    """The definitions, one token after the other, in float64."""
    w = np.concatenate([weights[sample.sample_id] for sample in samples]).astype(np.float64)
    d = np.concatenate([sample.initial.astype(np.float64) - sample.behavior for sample in samples])
    means = np.array([np.mean(weights[sample.sample_id], dtype=np.float64) for sample in samples])
    ratio_sums = np.array([np.sum(sample.initial.astype(np.float64) - sample.behavior) for sample in samples])
    log_w = np.log(w)
    low, high = settings.clip_log_weight
    tenth = np.concatenate([np.arange(len(s.initial)) * 10 // len(s.initial) for s in samples])
    return {
        "samples": len(samples),
        "scored_tokens": len(w),
        "ess": w.sum() ** 2 / (w**2).sum(),
        "ess_ratio": w.sum() ** 2 / (w**2).sum() / len(w),
        "seq_ess": means.sum() ** 2 / (means**2).sum(),
        "seq_ess_ratio": means.sum() ** 2 / (means**2).sum() / len(means),
        "weight_mean": w.mean(),
        "weight_std": w.std(),
        "weight_min": w.min(),
        "weight_max": w.max(),
        "log_weight_clipped_low": np.mean(log_w <= low + 1e-6),
        "log_weight_clipped_high": np.mean(log_w >= high - 1e-6),
        "saturated": np.mean((log_w <= low + 1e-6) | (log_w >= high - 1e-6)),
        "weight_by_decile": [w[tenth == part].mean() for part in range(10)],
        "log_ratio_mean": d.mean(),
        "log_ratio_clipped_low": np.mean(d < settings.clip_log_ratio[0]),
        "log_ratio_clipped_high": np.mean(d > settings.clip_log_ratio[1]),
        "kl": np.mean(-d),
        "k3_kl": np.mean(np.exp(d) - 1 - d),
        "chi2_token": np.mean(np.exp(2 * d)) - 1,
        "chi2_seq": np.mean(np.exp(2 * ratio_sums)) - 1,
        "ppl_target": np.exp(-np.mean(np.concatenate([s.initial for s in samples]), dtype=np.float64)),
        "ppl_behavior": np.exp(-np.mean(np.concatenate([s.behavior for s in samples]), dtype=np.float64)),
        "ppl_ratio": np.exp(np.mean(-d)),
        "log_ppl_diff": np.mean(-d),
    }, {
        **{f"weight_{name}": np.quantile(w, q, method="inverted_cdf") for name, q in QUANTILES.items()},
        **{f"log_ratio_{name}": np.quantile(d, q, method="inverted_cdf") for name, q in QUANTILES.items()},
        "top_1pct_mass": _top_mass(w),
        # Histograms hold float32.
        "log_ratio_min": d.min(),
        "log_ratio_max": d.max(),
    }


def _top_mass(w):
    ordered = np.sort(w)[::-1]
    share = 0.01 * len(w)
    whole = int(share)
    return (ordered[:whole].sum() + (share - whole) * ordered[whole]) / w.sum()


def weights_of(store, name):
    rows = store.weights[name].to_table().to_pylist()
    return {row["sample_id"]: np.array(row["weights"]) for row in rows if row["status"] == "ok"}


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_every_number_against_numpy(make_store, samples, level):
    made = many(samples, 150)
    settings = WeightSettings(level=level, clip_log_weight=(-0.5, 1.5))
    store = add_weights(make_store(made), **settings.model_dump())
    (found,) = statistics(store, [level])
    sources = dict(zip(*store.corpus.to_table(["sample_id", "source"]).to_pydict().values(), strict=True))
    groups = {None: found.corpus, **{group.source: group for group in found.sources}}
    assert set(groups) == {None, "even", "odd"}
    for source, group in groups.items():
        mine = [sample for sample in made if source in (None, sources[sample.sample_id])]
        exact, near = reference(mine, weights_of(store, level), settings)
        values = group.model_dump()
        for name, value in exact.items():
            assert values[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        for name, value in near.items():
            assert values[name] == pytest.approx(value, rel=RELATIVE_ERROR), name
        assert group.statuses == {"ok": len(mine)}
        assert exact.keys() | near.keys() | {"source", "statuses", "negatives"} == values.keys()


def test_only_weighted_positives_count_and_the_rest_is_told(make_store, samples):
    made = many(samples, 30)
    made[3].label = made[4].label = -1
    made[5].initial_status = "too_long"
    folder = make_store(made)
    kept = [sample for index, sample in enumerate(made) if index not in (3, 4, 5)]
    for scale, expected in {
        0.0: {"ok": 27, "dropped": 2, "unscored": 1},
        0.5: {"ok": 29, "unscored": 1},
    }.items():
        settings = WeightSettings(negative_scale=scale)
        store = add_weights(folder, **settings.model_dump())
        group = statistics(store)[0].corpus
        exact, _ = reference(kept, weights_of(store, "block"), settings)
        assert (group.statuses, group.negatives, group.samples) == (expected, 2, 27)
        assert group.ess == pytest.approx(exact["ess"], rel=1e-9)
        assert group.weight_min > 0


def test_wild_log_ratios_stay_numbers(make_store, samples):
    made = many(samples, 10)
    made[0].initial[:], made[0].behavior[:] = 0.0, -5000.0
    made[1].initial[:], made[1].behavior[:] = -5000.0, 0.0
    (found,) = statistics(add_weights(make_store(made)))
    numbers = [value for value in found.corpus.model_dump().values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()
    assert found.corpus.chi2_token > 1e200
    assert "Infinity" not in found.model_dump_json()


def test_a_store_where_nothing_is_weighted(make_store, samples):
    for sample in samples:
        sample.initial_status = "nonfinite"
    (found,) = statistics(add_weights(make_store(samples)))
    assert found.corpus.ess is None
    assert found.corpus.statuses == {"unscored": 20}
    (finding,) = found.findings
    assert finding.code == "nothing_left"
    assert "20 unscored" in finding.text


def test_missing_and_stale_weights_are_refused(make_store, samples):
    folder = make_store(samples)
    with pytest.raises(UsageError, match="has no weights yet"):
        statistics(open_store(folder))
    store = add_weights(folder)
    with pytest.raises(UsageError, match=r"weights/token.*have: block"):
        statistics(store, ["token"])
    store.stage("weights/block").shards[0].inputs["scores/behavior"] = "0" * 64
    with pytest.raises(MismatchError, match="was not made from the present scores/behavior"):
        statistics(store)


def codes(store, name):
    return {finding.code: finding for finding in statistics(store, [name])[0].findings}


def test_a_healthy_weighting_has_no_findings(make_store, samples):
    assert codes(add_weights(make_store(many(samples, 60, shift=-0.01, spread=0.05))), "block") == {}


def test_a_collapsed_weighting_is_found_and_each_remedy_helps(make_store, samples):
    # A teacher that is much surer of nearly every token of long samples.
    made = many(samples, 40, shift=-1.0, spread=0.3, length=600)
    folder = make_store(made)
    found = codes(add_weights(folder), "block")
    assert found.keys() == {"low_ess", "clipped_low", "saturated", "decays_with_position"}
    for code, finding in found.items():
        assert f"{finding.value:.3g}"[:3] in finding.text or f"{100 * finding.value:.3g} %" in finding.text, (
            code
        )
    options = {
        "low_ess": {"clip_log_weight": (-2, 5)},
        "saturated": {"clip_log_ratio": (-0.02, 0.3)},
        "decays_with_position": {"level": "sequence"},
    }
    for code, remedy in options.items():
        (text,) = [finding.text for finding in found.values() if finding.code == code]
        for option, value in remedy.items():
            shown = value if isinstance(value, str) else " ".join(f"{bound:g}" for bound in value)
            assert f"--{option.replace('_', '-')} {shown}" in text
        again = codes(add_weights(folder, name="mended", **remedy), "mended")
        better = again[code].value if code in again else None
        assert better is None or (better < found[code].value) == (code == "saturated")


def test_a_collapse_in_one_source_is_named(make_store, samples):
    made = many(samples, 60, shift=-0.01, spread=0.05)
    far = many(samples, 60, shift=-2.0, spread=0.1)
    # Row groups of three: the middle row of each is "odd".
    mixed = [far[i] if (i % 7 in (1, 4)) else made[i] for i in range(60)]
    found = codes(add_weights(make_store(mixed)), "block")
    assert found["clipped_low"].sources == ["odd"]
    assert found["clipped_low"].text.startswith("In 1 of 2 sources (odd): 100 %")


def test_half_precision_scores_are_told_of(make_store, samples):
    store = add_weights(make_store(many(samples, 60, shift=-0.01, spread=0.05)))
    store.manifest.stages["scores/initial"].settings["dtype"] = "bfloat16"
    finding = codes(store, "block")["noise_floor"]
    assert finding.text.startswith("Log-probs of initial were")
    assert "--dtype float32" in finding.text


def noise(p99):
    sizes = {"median": p99 / 3, "p99": p99, "max": 3 * p99, "mean": p99 / 2, "bias": 0.0}
    where = {"samples": 1, "tokens": 9, "max_sample_id": "s", "max_position": 1, "reference": "r"}
    return {"audit": {**sizes, **where, "clip_log_ratio": [-0.08, 0.3]}}


def test_measured_noise_takes_the_place_of_what_half_precision_is_assumed_to_make(make_store, samples):
    store = add_weights(make_store(many(samples, 60, shift=-0.01, spread=0.05)))
    initial, behavior = (store.manifest.stages[f"scores/{name}"] for name in ("initial", "behavior"))
    initial.settings["dtype"] = behavior.settings["dtype"] = "bfloat16"
    assert "initial and behavior were computed in half precision" in codes(store, "block")["noise_floor"].text

    initial.decisions = noise(0.003)
    text = codes(store, "block")["noise_floor"].text
    assert text.startswith("Log-probs of behavior were computed in half precision")
    assert "(measured, p99: initial 0.003, behavior not audited)" in text

    behavior.decisions = noise(0.004)  # sqrt(3^2 + 4^2) = 5 thousandths, a quarter of the limit
    assert codes(store, "block") == {}
    (found,) = statistics(store)
    assert found.audits["behavior"].p99 == 0.004

    initial.decisions = noise(0.03)
    finding = codes(store, "block")["noise_floor"]
    assert finding.value == pytest.approx(np.hypot(0.03, 0.004))
    assert finding.threshold == pytest.approx(0.02)
    assert "is 0.03 (p99: initial 0.03, behavior 0.004), 37.8 % of the smaller log-ratio clip" in finding.text

    behavior.decisions, behavior.settings["dtype"] = {}, "float32"
    finding = codes(store, "block")["noise_floor"]
    assert finding.value == 0.03
    assert "behavior not audited" in finding.text
    wide = add_weights(store.path, name="wide", clip_log_ratio=(-0.5, 0.5))
    wide.manifest.stages["scores/initial"].decisions = noise(0.03)
    assert codes(wide, "wide") == {}


def test_histogram_in_parts_is_the_histogram_of_all():
    random = np.random.default_rng(0)
    values = np.concatenate([-random.exponential(2, 5000), [0.0, -0.0, 1e-30, 3e38], np.full(100, 0.25)])
    values = values.astype(np.float32)
    whole, parts, other = Histogram(), Histogram(), Histogram()
    whole.add(values)
    for part in np.array_split(values[:3000], 7):
        parts.add(part)
    other.add(values[3000:])
    parts.update(other)
    parts.add(values[:0])
    assert parts.total == whole.total == len(values)
    np.testing.assert_array_equal(parts.counts, whole.counts)
    shares = [0, 0.001, 0.3, 0.5, 0.97, 0.985, 0.9999, 1]
    expected = np.quantile(values, shares, method="inverted_cdf")
    np.testing.assert_allclose(whole.quantiles(shares), expected, rtol=RELATIVE_ERROR)
    assert whole.quantiles([0.985])[0] == 0.25


def test_command_line(make_store, samples, capsys):
    folder = make_store(many(samples, 60))
    add_weights(folder, level="token")
    add_weights(folder, level="sequence")
    where = ["--store", str(folder)]
    assert run(["stats", "--format", "json", *where]) == 0
    nested = json.loads(capsys.readouterr().out)
    assert [one["weights"] for one in nested] == ["token", "sequence"]
    assert run(["stats", "--format", "jsonl", "--by", "source", "--weights", "token", *where]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"weights": "token", **group} for group in nested[0]["sources"]]
    assert run(["stats", "--format", "csv", *where]) == 0
    flat = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(flat[1]["ess"]) == nested[1]["corpus"]["ess"]
    assert json.loads(flat[0]["weight_by_decile"]) == nested[0]["corpus"]["weight_by_decile"]
    assert run(["stats", *where]) == 0
    shown = capsys.readouterr().out
    assert "ESS / tokens" in shown
    assert f"{nested[0]['corpus']['scored_tokens']:,}" in shown
    assert "token: initial against behavior, token level, gamma 0.999" in shown
    assert run(["stats", "--by", "source", *where]) == 0
    assert "│ even" in capsys.readouterr().out


def test_a_source_cannot_steer_the_terminal(make_store, samples):
    found = statistics(add_weights(make_store(samples)))[0]
    found.sources[0].source = "\x1b[2J[red]"
    console = Console(markup=False, width=200, file=io.StringIO())
    console.print(source_table(found))
    assert "│ [2J[red]" in console.file.getvalue()
    assert "\x1b" not in console.file.getvalue()
