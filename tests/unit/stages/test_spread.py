"""Rows chosen for an audit: how many, which, and that it does not matter how the corpus is cut."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_data.stages.spread import GroupLengths, by_group, spread_rows


def groups_of(lengths, eligible, size):
    """Row groups of `size` rows, two to a shard; sample i has id s<i>."""

    def read():
        for number, start in enumerate(range(0, len(lengths), size)):
            part = slice(start, start + size)
            ids = pa.chunked_array([pa.array([f"s{i}" for i in range(len(lengths))[part]], pa.string())])
            yield GroupLengths(
                f"part-{number // 2:05d}",
                number % 2,
                ids,
                np.array(lengths[part], np.int32),
                np.array(eligible[part]),
            )

    return read


def chosen(lengths, eligible, size, count):
    places = spread_rows(groups_of(lengths, eligible, size), count)
    return [(int(place.shard[5:]) * 2 + place.group) * size + place.row for place in places], places


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=80),
    st.integers(1, 90),
    st.integers(1, 9),
    st.integers(1, 40),
)
def test_as_many_as_asked_for_whatever_the_row_groups(rows, count, size, other_size):
    lengths, eligible = [row[0] for row in rows], [row[1] for row in rows]
    found, places = chosen(lengths, eligible, size, count)
    assert len(set(found)) == len(found) == min(count, sum(eligible))
    assert all(eligible[row] for row in found)
    assert found == chosen(lengths, eligible, other_size, count)[0]
    # The i-th shortest chosen row is as long as the row in the middle of the i-th of `count` equal parts.
    ordered = sorted(length for length, ok in rows if ok)
    middles = [int((i + 0.5) * len(ordered) / count) for i in range(count)]
    expected = [ordered[m] for m in middles] if count < len(ordered) else ordered
    assert sorted(lengths[row] for row in found) == expected
    taken = {(key, row) for key, group_rows in by_group(places).items() for row in group_rows.tolist()}
    assert taken == {((place.shard, place.group), place.row) for place in places}


def test_rows_of_one_length_are_chosen_as_if_at_random():
    found, _ = chosen([7] * 4000, [True] * 4000, 100, 400)
    assert abs(np.mean(found) - 2000) < 200
    assert np.std(found) > 1000
