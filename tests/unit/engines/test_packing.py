from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_data.engines import packing
from pear_data.engines.batching import needed_tokens
from pear_data.engines.packing import distinct_rows, fill_packs, lay_out, shared_prefix_groups
from pear_data.tokens import TokenBatch


def batch_of(samples: list[tuple[list[int], list[int]]]) -> TokenBatch:
    """(prompt ids, response ids) pairs, every response token scored."""
    ids = [np.array([*prompt, *response], dtype=np.int32) for prompt, response in samples]
    masks = [np.arange(len(i)) >= len(p) for i, (p, _) in zip(ids, samples, strict=True)]
    offsets = np.cumsum([0, *map(len, ids)])
    names = [f"s{row}" for row in range(len(ids))]
    return TokenBatch(names, np.concatenate(ids), np.concatenate(masks), offsets)


def prompts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 1000, length).tolist() for length in lengths]


def test_identical_samples_are_found() -> None:
    (one, two) = prompts(5, 6)
    batch = batch_of([(one, [1]), (two, [1]), (one, [1]), (one, [2]), (two, [1])])
    first, same_as = distinct_rows(batch)
    assert first.tolist() == [0, 1, 3]
    assert same_as.tolist() == [0, 1, 0, 2, 1]
    # The same ids with another mask are another sample.
    masked = TokenBatch(
        ["a", "b"], np.zeros(4, np.int32), np.array([False, True, True, False]), np.array([0, 2, 4])
    )
    assert distinct_rows(masked)[1].tolist() == [0, 1]


def test_responses_to_one_prompt_share_it() -> None:
    (one, two) = prompts(100, 80)
    batch = batch_of([(one, [1, 2]), (two, [3]), (one, [4]), (one, [5, 6, 7])])
    groups = shared_prefix_groups(batch, needed_tokens(batch), 1024)
    found = {(tuple(sorted(group.rows.tolist())), group.prefix) for group in groups}
    assert found == {((0, 2, 3), 100), ((1,), 0)}


def test_a_short_common_beginning_does_not_end_a_long_one() -> None:
    system, (one, two, three) = prompts(40)[0], prompts(300, 300, 300)
    samples = [
        (system + one, [1]),
        (system + one, [2]),
        (system + one, [3]),
        (system + two, [4]),
        (system + three, [5]),
    ]
    groups = shared_prefix_groups(batch_of(samples), np.full(5, 340), 4096)
    found = sorted((len(group.rows), group.prefix) for group in groups)
    assert found == [(2, 40), (3, 340)]


@given(st.lists(st.integers(0, 5), max_size=6))
def test_no_division_saves_much_more(shared: list[int]) -> None:
    def saved(places: list[int]) -> int:
        return (len(places) - 1) * min(shared[min(places) : max(places)], default=0)

    def divisions(places: list[int]) -> Iterator[list[list[int]]]:
        if not places:
            yield []
            return
        for rest in divisions(places[1:]):
            yield [[places[0]], *rest]
            for index, group in enumerate(rest):
                yield [*rest[:index], [places[0], *group], *rest[index + 1 :]]

    everyone = list(range(len(shared) + 1))
    found = packing._cheapest_cover(shared)
    assert sorted(place for places, _ in found for place in places) == everyone
    assert all(common <= min(shared[min(p) : max(p)], default=0) for p, common in found)
    best = max(sum(map(saved, division)) for division in divisions(everyone))
    assert sum((len(places) - 1) * common for places, common in found) >= 0.75 * best


def test_a_crowded_prompt_is_computed_once_in_a_while() -> None:
    (prompt,) = prompts(90)
    batch = batch_of([(prompt, [row, *range(30)]) for row in range(40)])
    needed = needed_tokens(batch)
    groups = shared_prefix_groups(batch, needed, 100)
    assert sorted(np.concatenate([group.rows for group in groups]).tolist()) == list(range(40))
    assert all(group.num_tokens <= 100 * packing.SHARED_PACKS for group in groups)
    assert {group.prefix for group in groups} <= {90, 0}
    assert len(groups) < 8


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 90), st.integers(0, 40), st.integers(0, 2)),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 300),
)
def test_every_token_is_where_the_layout_says(shapes: list[tuple[int, int, int, int]], budget: int) -> None:
    stems = prompts(120, 120, 120, 120)
    samples = [
        (stems[stem][: 1 + length], prompts(scored + seed)[0][seed:]) for stem, length, scored, seed in shapes
    ]
    batch = batch_of(samples)
    needed = needed_tokens(batch)
    groups = shared_prefix_groups(batch, needed, budget)
    packs = list(fill_packs(groups, budget))
    assert sum(len(pack) for pack in packs) == len(groups)
    seen = []
    for members in packs:
        assert len(members) == 1 or sum(group.num_tokens for group in members) <= budget
        pack = lay_out(batch, needed, members)
        assert len(pack.input_ids) == pack.lengths.sum() == sum(group.num_tokens for group in members)
        seen += pack.rows.tolist()
        check_sequences(batch, pack)
    assert sorted(seen) == np.flatnonzero(needed).tolist()


def check_sequences(batch: TokenBatch, pack: packing.Pack) -> None:
    """Follow each predicting row back through its sequence and its prefix: it must see just the sample's past."""
    cut = np.cumsum(batch.num_scored[pack.rows])[:-1]
    for row, predicting, targets in zip(
        pack.rows, np.split(pack.predicting, cut), np.split(pack.targets, cut), strict=True
    ):
        ids = batch.input_ids[slice(*batch.offsets[row : row + 2])]
        scored = np.flatnonzero(batch.loss_mask[slice(*batch.offsets[row : row + 2])])
        assert targets.tolist() == ids[scored].tolist()
        for place, position in zip(predicting, scored - 1, strict=True):
            sequence = int(np.searchsorted(pack.starts + pack.lengths, place, side="right"))
            prefix = np.arange(pack.prefix_lengths[sequence]) + pack.prefix_starts[sequence]
            past = [*prefix, *range(pack.starts[sequence], place + 1)]
            assert pack.input_ids[past].tolist() == ids[: position + 1].tolist()
            assert pack.positions[past].tolist() == list(range(position + 1))


@pytest.mark.parametrize("budget", [1, 50, 1000])
def test_packs_are_filled(budget: int) -> None:
    random = np.random.default_rng(3)
    groups = [
        packing.Group(np.array([row]), 0, int(n)) for row, n in enumerate(random.lognormal(4, 1, 200) + 1)
    ]
    packs = list(fill_packs(groups, budget))
    assert sorted(int(group.rows[0]) for pack in packs for group in pack) == list(range(200))
    if budget == 1000:
        sizes = [sum(group.num_tokens for group in pack) for pack in packs]
        assert np.mean(sizes[:-1]) > 900
