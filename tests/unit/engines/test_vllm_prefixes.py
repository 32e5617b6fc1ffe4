"""Log-probs put together from shared rows, against a stand-in model whose log-probs are a function of the prefix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_data.engines import vllm_prefixes
from pear_data.engines.vllm_prefixes import Logprobs, PrefixTree, Request

samples = st.lists(
    st.lists(st.integers(0, 2), min_size=2, max_size=9).flatmap(
        lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids) - 1))
    ),
    max_size=12,
)


def logprob(ids: list[int], token: int) -> float:
    return float(np.float32(-(hash((tuple(ids), token)) % 10_007)))


def answer(request: Request) -> Logprobs:
    ids = request.ids.tolist()
    rows = [
        [logprob(ids[: row + 1], token) if token >= 0 else -np.inf for token in targets]
        for row, targets in enumerate(request.targets.tolist(), request.start)
    ]
    return np.array(rows, dtype=np.float32)


def tree_of(found: list[tuple[list[int], int]], share: bool) -> PrefixTree:
    return PrefixTree(
        [np.array(ids, dtype=np.int32) for ids, _ in found], [first for _, first in found], share=share
    )


def expected(found: list[tuple[list[int], int]]) -> list[list[float]]:
    return [[logprob(ids[:t], ids[t]) for t in range(first, len(ids))] for ids, first in found]


@given(samples, st.booleans(), st.integers(1, 4))
def test_every_sample_gets_its_own_log_probs(
    found: list[tuple[list[int], int]], share: bool, widest: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_prefixes, "MAX_TARGETS", widest)
        tree = tree_of(found, share)
    requests = tree.requests.values()
    assert all(request.targets.shape[1] <= widest for request in requests)
    assert all(len(request.targets) == len(request.ids) - 1 - request.start > 0 for request in requests)
    got = tree.logprobs({i: answer(request) for i, request in tree.requests.items()})
    assert [values.tolist() for values in got] == expected(found)


@given(samples)
def test_no_cached_prefix_reaches_rows_that_are_asked_for(found: list[tuple[list[int], int]]) -> None:
    """Whatever prefix of the earlier requests is cached; but for samples that go on where another's last row is."""
    earlier: list[Request] = []
    for request in tree_of(found, share=True).requests.values():
        for other in earlier if request.read_cache else []:
            common = vllm_prefixes._common_length(request.ids, other.ids)
            assert common <= request.start + (common == len(other.ids))
        earlier.append(request)


def test_responses_to_one_prompt_share_its_rows() -> None:
    prompt = [5, 6, 7, 8]
    found = [([*prompt, 1, 2, 3], 4), ([*prompt, 1, 2, 4], 4), ([*prompt, 9, 9], 4), ([*prompt, 1, 2, 3], 2)]
    tree = tree_of(found, share=True)
    assert {i: request.start for i, request in tree.requests.items()} == {0: 1, 2: 4}
    assert tree.requests[0].targets.tolist() == [[7, -1], [8, -1], [1, 9], [2, -1], [3, 4]]
    assert tree.requests[2].targets.tolist() == [[9]]


def test_without_sharing_only_identical_samples_are_joined() -> None:
    tree = tree_of([([1, 2, 3], 1), ([1, 2, 4], 1), ([1, 2, 3], 2)], share=False)
    assert {i: request.targets[:, 0].tolist() for i, request in tree.requests.items()} == {
        0: [2, 3],
        1: [2, 4],
    }


def test_a_sample_too_many_at_one_row_starts_over_without_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_prefixes, "MAX_TARGETS", 2)
    tree = tree_of([([1, 2, token, 0], 2) for token in range(4)], share=True)
    assert [request.read_cache for request in tree.requests.values()] == [True, True, False, True]
