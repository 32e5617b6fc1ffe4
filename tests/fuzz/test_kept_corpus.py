"""What the fuzzer found worth keeping is read again: files that once crashed a reader among them."""

from __future__ import annotations

from pathlib import Path

import pytest
from targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


def test_every_target_has_a_corpus():
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_no_kept_file_is_a_fault(name):
    for path in sorted((CORPUS / name).iterdir()):
        TARGETS[name](path.read_bytes())
