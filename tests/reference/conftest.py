from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import corpus, reference_logprobs, save_model

from pear_data.tokens import TokenBatch


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a tiny model of a kind, made once."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda kind: save_model(folder, kind))


@pytest.fixture(scope="session")
def engine_corpus() -> TokenBatch:
    return corpus()


@pytest.fixture(scope="session")
def expected(model_dir: Callable[[str], str], engine_corpus: TokenBatch) -> Callable[[str], np.ndarray]:
    """Reference log-probs of the corpus under a kind of model, float64."""
    return cache(lambda kind: reference_logprobs(model_dir(kind), engine_corpus))
