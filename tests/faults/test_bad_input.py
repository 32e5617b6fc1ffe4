"""Every case of `bad_input.py` ends with its exit code and message."""

from __future__ import annotations

import pytest
from bad_input import CASES, outcome


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_ends_as_told(case, tmp_path):
    code, message = outcome(case, tmp_path)
    assert code == case.code, message
    assert case.message in message
    assert "unexpected" not in message
