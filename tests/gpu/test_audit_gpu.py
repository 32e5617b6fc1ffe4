"""The audit's reference on CUDA: float32 products, whatever the process allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import corpus, reference_logprobs, save_model

from pear_data.stages.audit_reference import PlainFloat32

pytestmark = pytest.mark.gpu


def test_tf32_is_not_used_where_it_is_allowed(tmp_path: Path) -> None:
    model, batch = save_model(tmp_path, "qwen2"), corpus()
    batch = batch.take(np.flatnonzero(batch.num_scored))
    expected = reference_logprobs(model, batch, "cpu", torch.float64)
    reference = PlainFloat32(model, None, False)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for row in range(len(batch)):
            sample = batch.take([row])
            found = reference.logprobs(sample.input_ids, sample.loss_mask)
            scored = slice(*batch.scored_offsets[row : row + 2])
            assert np.abs(found - expected[scored]).max() <= 2e-5
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)
        reference.close()
    assert reference.description.endswith("on cuda")
