"""A comparison against plain float64 numpy over all tokens and samples at once."""

from __future__ import annotations

import dataclasses
import io
import itertools

import numpy as np
import pytest
from rich.console import Console

from pear_data import open_store
from pear_data.binning import BINS, bins_of
from pear_data.config import WeightSettings
from pear_data.errors import UsageError
from pear_data.progress import Silent
from pear_data.stages.compare import compare
from pear_data.stages.compare_text import comparison_tables
from pear_data.stages.compared_tokens import ComparedTokens
from pear_data.stages.rank_correlation import Correlation, ranks_of, shared_ranks
from pear_data.stages.statistics import statistics
from pear_data.stages.weight import weight
from pear_data.store import writable_store

LEVELS = ("token", "block", "sequence")


def add_weights(folder, **settings):
    with writable_store(folder) as store:
        weight(store, WeightSettings(workers=1, **settings), Silent())


@pytest.fixture
def compared(make_store, samples):
    """`compared(samples, names...)`: a store of them with a weighting of each level."""

    def make(chosen=samples):
        folder = make_store(chosen)
        for level in LEVELS:
            add_weights(folder, level=level)
        return folder

    return make


# -- the reference ---------------------------------------------------------------------------------------


def average_ranks(values):
    """Ranks from 1, equal values sharing the mean of theirs."""
    values = np.asarray(values)
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def exact_spearman(first, second):
    return np.corrcoef(average_ranks(first), average_ranks(second))[0, 1]


def weights_of(folder, name, chosen):
    """The weights of the samples `chosen`, in their order."""
    rows = {
        row["sample_id"]: row["weights"] for row in open_store(folder).weights[name].to_table().to_pylist()
    }
    return [np.float32(rows[sample.sample_id]) for sample in chosen]


# -- rank correlation ------------------------------------------------------------------------------------


def in_parts(first, second, bins=None):
    """Spearman's correlation as the pass has it: the ranks of bins, summed over three parts."""
    tables, places = [], []
    for values in (first, second):
        distinct, place = np.unique(values, return_inverse=True)
        tables.append(shared_ranks(np.bincount(place, minlength=len(distinct))))
        places.append(place)
    correlation = Correlation(2)
    for rows in np.array_split(np.arange(len(first)), 3):
        correlation.add([table[place[rows]] for table, place in zip(tables, places, strict=True)])
    return correlation.of(0, 1)


@pytest.mark.parametrize("seed", range(5))
def test_spearman_with_ties_is_exact(seed):
    random = np.random.default_rng(seed)
    first = random.integers(0, 12, 200).astype(np.float32)
    second = (first + random.integers(0, 9, 200)).astype(np.float32)
    want = exact_spearman(first, second)
    assert in_parts(first, second) == pytest.approx(want, abs=1e-12)
    whole = Correlation(2)
    whole.add([ranks_of(first), ranks_of(second)])
    assert whole.of(0, 1) == pytest.approx(want, abs=1e-12)
    assert (average_ranks(first) - (len(first) + 1) / 2) / len(first) == pytest.approx(ranks_of(first))


def test_a_column_of_one_value_has_no_rank_correlation():
    correlation = Correlation(3)
    values = np.arange(9, dtype=np.float32)
    correlation.add([ranks_of(values), ranks_of(np.ones(9, dtype=np.float32)), ranks_of(-values)])
    assert correlation.of(0, 1) is None
    assert correlation.of(0, 2) == pytest.approx(-1, abs=1e-15)


def test_spearman_of_real_weights_is_near_the_exact_one(compared, samples):
    random = np.random.default_rng(3)
    longer = [dataclasses.replace(sample) for sample in samples]
    for sample in longer:
        count = len(sample.initial)
        sample.initial = np.minimum(sample.behavior + random.normal(0, 0.2, count), 0).astype(np.float32)
    folder = compared(longer)
    found = compare(open_store(folder), LEVELS)
    assert [(pair.first, pair.second) for pair in found.pairs] == list(itertools.combinations(LEVELS, 2))
    assert (found.samples, found.scored_tokens) == (len(longer), sum(len(s.initial) for s in longer))
    for pair in found.pairs:
        weights = [weights_of(folder, name, longer) for name in (pair.first, pair.second)]
        tokens = [np.concatenate(parts) for parts in weights]
        means = exact_spearman(*([part.mean(dtype=np.float64) for part in parts] for parts in weights))
        assert pair.token_rank_correlation == pytest.approx(exact_spearman(*map(bins_of, tokens)), abs=1e-12)
        # So few tokens feel it where two of them share a bin.
        assert pair.token_rank_correlation == pytest.approx(exact_spearman(*tokens), abs=5e-3)
        assert pair.sample_rank_correlation == pytest.approx(means, abs=1e-12)


def test_the_binned_rank_correlation_of_many_tokens_is_within_a_thousandth():
    random = np.random.default_rng(0)
    first = np.exp(random.normal(0, 1.5, 200_000)).astype(np.float32)
    for noise in (0.01, 0.5, 3):
        second = (first * np.exp(random.normal(0, noise, len(first)))).astype(np.float32)
        assert of_tokens(first, second) == pytest.approx(sorted_spearman(first, second), abs=1e-3)


def of_tokens(*columns):
    """What the pass over tokens finds, from two parts."""
    ranks = [shared_ranks(np.bincount(bins_of(column), minlength=BINS)) for column in columns]
    found = ComparedTokens(len(columns), 1)
    for rows in np.array_split(np.arange(len(columns[0])), 2):
        found.add([column[rows] for column in columns], ranks, np.array([len(rows)]), int(rows[0]))
    return found.correlation.of(0, 1)


def sorted_spearman(first, second):
    """Exact for values that are all but all distinct, of any number."""
    return np.corrcoef(*(np.argsort(np.argsort(values)) for values in (first, second)))[0, 1]


# -- which samples, and where they disagree --------------------------------------------------------------


def test_the_table_is_that_of_stats(compared):
    store = open_store(compared())
    assert compare(store, ["block", "token"]).weightings == statistics(store, ["block", "token"])


@pytest.mark.parametrize("wanted", [1, 4, 100])
def test_disagreements_are_the_farthest_from_the_usual(compared, samples, wanted):
    folder = compared()
    store = open_store(folder)
    corpus = store.corpus.to_table(columns=["sample_id", "source"])
    sources = dict(zip(*corpus.to_pydict().values(), strict=True))
    pair = compare(store, ["block", "sequence"], disagreements=wanted).pairs[0]
    first, second = (weights_of(folder, name, samples) for name in ("block", "sequence"))

    logs = [np.log(a.astype(np.float64)) - np.log(b) for a, b in zip(first, second, strict=True)]
    usual = np.concatenate(logs).mean()
    assert pair.token_log_difference == pytest.approx(usual, abs=1e-6)
    farthest = [int(np.abs(log - usual).argmax()) for log in logs]
    apart = np.array([log[t] - usual for log, t in zip(logs, farthest, strict=True)])
    order = np.argsort(-np.abs(apart))[:wanted]
    assert len(pair.tokens) == len(order)
    for token, index in zip(pair.tokens, order, strict=True):
        sample, t = samples[index], farthest[index]
        named = (sample.sample_id, sources[sample.sample_id], t + 1)
        assert (token.sample_id, token.source, token.t) == named
        assert token.token == f" t{sample.input_ids[sample.loss_mask][t]}"
        assert (token.first_weight, token.second_weight) == (first[index][t], second[index][t])
        assert token.log_difference == pytest.approx(apart[index], abs=1e-5)

    means = [np.array([part.mean(dtype=np.float64) for part in parts]) for parts in (first, second)]
    logs = np.log(means[0]) - np.log(means[1])
    assert pair.sample_log_difference == pytest.approx(logs.mean(), abs=1e-6)
    order = np.argsort(-np.abs(logs - logs.mean()))[:wanted]
    named = [(samples[index].sample_id, sources[samples[index].sample_id]) for index in order]
    assert [(sample.sample_id, sample.source) for sample in pair.samples] == named
    for sample, index in zip(pair.samples, order, strict=True):
        assert sample.first_weight_mean == pytest.approx(means[0][index], rel=1e-6)
        assert sample.second_weight_mean == pytest.approx(means[1][index], rel=1e-6)
        assert sample.log_difference == pytest.approx(logs[index] - logs.mean(), abs=1e-5)


def test_only_samples_with_weights_in_all_are_compared(make_store, samples):
    samples[2].label = -1
    samples[5].initial_status = "too_long"
    samples[9].behavior_status = "nonfinite"
    folder = make_store(samples)
    add_weights(folder, level="token", negative_scale=0.5)
    add_weights(folder, level="dft", behavior="other")  # weighs sample 9 too
    add_weights(folder, level="sequence")
    kept = [sample for index, sample in enumerate(samples) if index not in (2, 5, 9)]
    found = compare(open_store(folder), ["token", "dft"], disagreements=50)
    assert found.samples == len(kept)
    assert {one.corpus.samples for one in found.weightings} == {len(kept), len(kept) + 1}
    assert {sample.sample_id for sample in found.pairs[0].samples} == {sample.sample_id for sample in kept}
    weights = [np.concatenate(weights_of(folder, name, kept)) for name in ("token", "dft")]
    want = exact_spearman(*map(bins_of, weights))
    assert found.pairs[0].token_rank_correlation == pytest.approx(want, abs=1e-12)


def test_weights_that_are_all_equal_are_ranked_like_nothing(compared):
    folder = compared()
    add_weights(folder, level="uniform")
    add_weights(folder, level="uniform", name="again")
    equal, other = compare(open_store(folder), ["uniform", "again", "block"]).pairs[:2]
    assert (equal.token_rank_correlation, equal.sample_rank_correlation) == (None, None)
    assert (equal.samples, equal.tokens) == ([], [])
    assert (other.token_rank_correlation, other.sample_rank_correlation) == (None, None)
    assert len(other.samples) == len(other.tokens) == 5


def test_a_weighting_times_a_constant_is_the_same_one(compared):
    folder = compared()
    add_weights(folder, level="block", normalize="corpus", name="scaled")
    pair = compare(open_store(folder), ["block", "scaled"]).pairs[0]
    # Times a constant, weights fall into bins cut elsewhere.
    assert pair.token_rank_correlation == pytest.approx(1, abs=1e-3)
    assert pair.sample_rank_correlation == pytest.approx(1, abs=1e-12)
    assert (pair.samples, pair.tokens) == ([], [])


def test_a_weight_of_nothing_has_a_finite_difference(make_store, samples):
    samples[3].initial[:] = -200.0
    folder = make_store(samples)
    add_weights(folder, level="dft")
    add_weights(folder, level="uniform")
    pair = compare(open_store(folder), ["dft", "uniform"]).pairs[0]
    assert pair.samples[0].sample_id == pair.tokens[0].sample_id == "s3"
    assert pair.tokens[0].first_weight == 0
    assert np.isfinite(pair.tokens[0].log_difference)


def test_nothing_in_common(make_store, samples):
    for sample in samples:
        sample.label = -1
    folder = make_store(samples)
    for level in ("token", "block"):
        add_weights(folder, level=level)
    found = compare(open_store(folder), ["token", "block"])
    assert found.samples == found.scored_tokens == 0
    pair = found.pairs[0]
    assert (pair.token_rank_correlation, pair.token_log_difference, pair.samples, pair.tokens) == (
        None,
        None,
        [],
        [],
    )


def test_without_a_tokenizer_tokens_are_their_ids(compared, samples):
    store = open_store(compared())
    store.manifest.tokenizer = None
    token = compare(store, ["block", "sequence"]).pairs[0].tokens[0]
    sample = next(sample for sample in samples if sample.sample_id == token.sample_id)
    assert token.token == f"[{sample.input_ids[sample.loss_mask][token.t - 1]}]"


def test_hostile_text_is_made_safe_to_print(compared, samples):
    for sample in samples:
        sample.sample_id = f"\x1b[2J{sample.sample_id}\u202e\n"
    console = Console(markup=False, highlight=False, emoji=False, width=500, file=io.StringIO())
    for shown in comparison_tables(compare(open_store(compared()), LEVELS)):
        console.print(shown)
    printed = console.file.getvalue()
    assert "[2Js13⏎" in printed
    assert not {"\x1b", "\u202e"} & set(printed)


def test_what_looks_wrong_is_counted(compared, samples):
    for sample in samples:
        sample.initial[:] = sample.behavior - 3
    found = compare(open_store(compared()), ["block", "token"])
    lines = [shown for shown in comparison_tables(found) if isinstance(shown, str)]
    line = next(line for line in lines if line.startswith("block: "))
    assert f"; {len(found.weightings[0].findings)} thing" in line
    assert line.endswith("wrong, see `pear-data stats`")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "two weightings or more"),
        (("token",), r"two weightings or more \(have: token, block, sequence\)"),
        (("token", "token"), "token is named twice"),
        (("token", "lines"), r"no weights/lines: make it with .*have: token, block, sequence"),
    ],
)
def test_what_cannot_be_compared_is_refused(compared, names, message):
    with pytest.raises(UsageError, match=message):
        compare(open_store(compared()), names)
