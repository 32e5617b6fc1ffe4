"""k3 and chi-square from bins and two exact sums against the sums themselves."""

from __future__ import annotations

import numpy as np
import pytest

from pear_data.stages.divergence import chi2_mean, k3_mean
from pear_data.stages.measure import Totals

RANDOM = np.random.default_rng(0)
LOG_RATIOS = {
    "close": (RANDOM.normal(-0.01, 0.05, 10_000), 1e-5, 1e-4),
    "usual": (RANDOM.normal(-0.05, 0.3, 10_000), 1e-4, 1e-3),
    "far": (-RANDOM.uniform(1, 3, 10_000), 1e-5, 1e-5),
    "long left tail": (-(RANDOM.exponential(1, 10_000) ** 2), 1e-4, 1e-4),
    "two values": (RANDOM.choice([-0.1003, 0.2], 100), 1e-5, 1e-5),
    "few": (RANDOM.normal(-0.05, 0.3, 30), 1e-3, 1e-2),
    "one": (np.array([-0.3]), 1e-12, 1e-12),
    "decided by a few": (RANDOM.standard_t(2, 100_000) * 0.1, 0.05, 0.1),
}


def totals_of(log_ratios):
    totals = Totals()
    totals.decile_tokens[0] = len(log_ratios)
    totals.decile_target[0], totals.decile_ratio_square[0] = log_ratios.sum(), (log_ratios**2).sum()
    single = log_ratios.astype(np.float32)
    totals.log_ratios.add(single)
    return totals


@pytest.mark.parametrize("name", LOG_RATIOS)
def test_against_the_sums_themselves(name):
    log_ratios, k3_error, chi2_error = LOG_RATIOS[name]
    log_ratios = log_ratios.astype(np.float32).astype(np.float64)
    totals = totals_of(log_ratios)
    assert k3_mean(totals) == pytest.approx(np.mean(np.expm1(log_ratios) - log_ratios), rel=k3_error)
    assert chi2_mean(totals) == pytest.approx(np.mean(np.expm1(2 * log_ratios)), rel=chi2_error)


def test_equal_policies_and_wild_log_ratios():
    assert (k3_mean(totals_of(np.zeros(9))), chi2_mean(totals_of(np.zeros(9)))) == (0, 0)
    wild = totals_of(np.array([-5000.0, 5000.0]))
    assert np.isfinite([k3_mean(wild), chi2_mean(wild)]).all()
