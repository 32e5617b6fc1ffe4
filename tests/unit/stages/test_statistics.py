"""Every diagnostic against plain float64 numpy over the arrays that the store was made from."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from pear_data.binning import RELATIVE_ERROR
from pear_data.cli.entry import run
from pear_data.config import WeightSettings
from pear_data.errors import MismatchError, UsageError
from pear_data.progress import Silent
from pear_data.stages.statistics import QUANTILES, statistics
from pear_data.stages.statistics_text import ROWS, decile_table, source_table, statistics_table
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
    sums = np.array([np.sum(weights[sample.sample_id], dtype=np.float64) for sample in samples])
    means = np.array([np.mean(weights[sample.sample_id], dtype=np.float64) for sample in samples])
    ratio_sums = np.array([np.sum(sample.initial.astype(np.float64) - sample.behavior) for sample in samples])
    log_w = np.log(w)
    low, high = settings.clip_log_weight
    tenth = np.concatenate([np.arange(len(s.initial)) * 10 // len(s.initial) for s in samples])
    return (
        {
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
            "chi2_seq": np.mean(np.exp(2 * ratio_sums)) - 1,
            "ppl_target": np.exp(-np.mean(np.concatenate([s.initial for s in samples]), dtype=np.float64)),
            "ppl_behavior": np.exp(-np.mean(np.concatenate([s.behavior for s in samples]), dtype=np.float64)),
            "ppl_ratio": np.exp(np.mean(-d)),
            "log_ppl_diff": np.mean(-d),
        },
        {
            **{f"weight_{name}": np.quantile(w, q, method="inverted_cdf") for name, q in QUANTILES.items()},
            **{
                f"log_ratio_{name}": np.quantile(d, q, method="inverted_cdf") for name, q in QUANTILES.items()
            },
        },
        {
            "top_1pct_mass": _top_mass(w),
            "top_1pct_samples_mass": _top_mass(sums),
            "k3_kl": np.mean(np.exp(d) - 1 - d),
            "chi2_token": np.mean(np.exp(2 * d)) - 1,
        },
    )


def reference_by_decile(samples, weights, settings):
    """One tenth after the other, one sample after the other."""
    low, high = settings.clip_log_weight
    rows = []
    for part in range(10):
        w, d = [], []
        for sample in samples:
            mine = np.arange(len(sample.initial)) * 10 // len(sample.initial) == part
            w.append(weights[sample.sample_id][mine])
            d.append((sample.initial.astype(np.float64) - sample.behavior)[mine])
        w, d = np.concatenate(w), np.concatenate(d)
        at_bound = (np.log(w) <= low + 1e-6) | (np.log(w) >= high - 1e-6)
        rows.append(
            {
                "tokens": len(w),
                "ess_ratio": w.sum() ** 2 / (w**2).sum() / len(w),
                "weight_mean": w.mean(),
                "log_ratio_mean": d.mean(),
                "log_ratio_clipped_low": np.mean(d < settings.clip_log_ratio[0]),
                "log_ratio_clipped_high": np.mean(d > settings.clip_log_ratio[1]),
                "saturated": np.mean(at_bound),
                "ppl_ratio": np.exp(-d.mean()),
            }
        )
    return rows


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
        weights = weights_of(store, level)
        exact, quantiles, estimated = reference(mine, weights, settings)
        values = group.model_dump()
        for name, value in exact.items():
            assert values[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        for name in ("min", "max"):  # float32
            expected = getattr(np, name)(
                [getattr(s.initial.astype(float) - s.behavior, name)() for s in mine]
            )
            assert values[f"log_ratio_{name}"] == pytest.approx(expected, rel=1e-6)
        for name, value in quantiles.items():
            assert values[name] == pytest.approx(value, rel=RELATIVE_ERROR), name
        for name, value in estimated.items():
            assert values[name] == pytest.approx(value, rel=2 * RELATIVE_ERROR if "top" in name else 1e-3), (
                name
            )
        by_decile = reference_by_decile(mine, weights, settings)
        for tenth, expected in zip(values["by_decile"], by_decile, strict=True):
            assert tenth == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert group.statuses == {"ok": len(mine)}
        others = {"source", "statuses", "negatives", "by_decile", "log_ratio_min", "log_ratio_max"}
        assert exact.keys() | quantiles.keys() | estimated.keys() | others == values.keys()


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
        exact, *_ = reference(kept, weights_of(store, "block"), settings)
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


@pytest.mark.parametrize("level", ["uniform", "dft"])
def test_a_baseline_needs_no_behavior_policy(make_store, samples, level):
    made = many(samples, 60)
    folder = make_store(made)
    with writable_store(folder) as store:
        del store.manifest.stages["scores/behavior"]
        store.save()
    (found,) = statistics(add_weights(folder, level=level))
    target = np.concatenate([sample.initial for sample in made]).astype(np.float64)
    w = np.exp(target) if level == "dft" else np.ones(len(target))
    corpus = found.corpus
    assert corpus.ess == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-6)
    assert corpus.ppl_target == pytest.approx(np.exp(-target.mean()))
    unknown = {name for name, value in corpus.model_dump().items() if value is None}
    assert unknown == {
        *(name for name in type(corpus).model_fields if name.startswith("log_ratio_")),
        *("log_weight_clipped_low", "log_weight_clipped_high", "saturated"),
        *("source", "kl", "k3_kl", "chi2_token", "chi2_seq", "ppl_behavior", "ppl_ratio", "log_ppl_diff"),
    }
    assert all(
        tenth.ppl_ratio is None and tenth.saturated is None and tenth.weight_mean is not None
        for tenth in corpus.by_decile
    )
    assert (found.findings, list(found.audits)) == ([], ["initial"])
    assert "NaN" not in found.model_dump_json()
    assert statistics_table([found]).row_count == len(ROWS)
    assert decile_table(found).row_count == 10


def test_a_baseline_clips_nothing(make_store, samples):
    (found,) = statistics(add_weights(make_store(many(samples, 60)), level="dft"))
    corpus = found.corpus
    assert corpus.kl == pytest.approx(0.05, abs=0.05)
    assert (corpus.log_ratio_clipped_low, corpus.saturated, corpus.log_weight_clipped_high) == (None,) * 3
    assert {tenth.log_ratio_clipped_high for tenth in corpus.by_decile} == {None}


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
    assert run(["stats", "--by", "decile", *where]) == 0
    assert "│ 90 to 100 %" in capsys.readouterr().out
    assert run(["stats", "--by", "decile", "--format", "jsonl", "--weights", "token", *where]) == 0
    tenths = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert tenths == [
        {"weights": "token", "decile": place, **tenth}
        for place, tenth in enumerate(nested[0]["corpus"]["by_decile"])
    ]


def test_a_source_cannot_steer_the_terminal(make_store, samples):
    found = statistics(add_weights(make_store(samples)))[0]
    found.sources[0].source = "\x1b[2J[red]"
    console = Console(markup=False, width=200, file=io.StringIO())
    console.print(source_table(found))
    assert "│ [2J[red]" in console.file.getvalue()
    assert "\x1b" not in console.file.getvalue()
