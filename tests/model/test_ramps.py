"""Ramps follow their formulas, rise, and end at 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multidomain_cct.model.ramps import RAMPS, ramp_at

FORMULAS = {
    "exp": lambda t: np.exp(-5 * (1 - t) ** 2),
    "linear": lambda t: t,
    "cosine": lambda t: (1 - np.cos(np.pi * t)) / 2,
    "log": lambda t: 1 - np.exp(-5 * t),
    "none": lambda t: 1.0,
}


@pytest.mark.parametrize("kind", RAMPS)
def test_a_ramp_follows_its_formula_until_its_share_of_the_run_is_done(kind: str) -> None:
    for fraction in (0.1, 0.4, 1.0):
        for t in (0.0, 0.13, 0.5, 0.99):
            assert ramp_at(kind, fraction, t * fraction) == pytest.approx(FORMULAS[kind](t), abs=1e-12)
        assert ramp_at(kind, fraction, fraction) == ramp_at(kind, fraction, 1.0) == 1


@pytest.mark.parametrize("kind", RAMPS)
@given(fraction=st.floats(0, 1), first=st.floats(0, 1), second=st.floats(0, 1))
def test_ramps_rise_and_lie_between_0_and_1(kind: str, fraction: float, first: float, second: float) -> None:
    earlier, later = sorted((first, second))
    assert 0 <= ramp_at(kind, fraction, earlier) <= ramp_at(kind, fraction, later) <= 1


@pytest.mark.parametrize("kind", RAMPS)
def test_a_ramp_of_no_length_gives_one_from_the_start(kind: str) -> None:
    assert ramp_at(kind, 0.0, 0.0) == 1


def test_the_papers_ramp_starts_at_a_hundred_and_fiftieth() -> None:
    assert ramp_at("exp", 0.1, 0.0) == pytest.approx(math.exp(-5))
