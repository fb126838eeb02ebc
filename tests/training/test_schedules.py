import math

import pytest
import torch

from multidomain_cct.training.schedules import ConsistencySettings, OptimiserSettings, build_optimiser, learning_rate, ramp_at, set_learning_rate


def test_the_exponential_ramp_follows_its_formula() -> None:
    settings = ConsistencySettings(ramp="exp", ramp_fraction=0.1)
    for step in (0, 13, 50, 99):
        assert ramp_at(settings, step, 1000) == pytest.approx(math.exp(-5 * (1 - step / 100) ** 2), abs=1e-15)
    assert ramp_at(settings, 100, 1000) == ramp_at(settings, 999, 1000) == 1


@pytest.mark.parametrize("ramp", ["exp", "linear", "cosine", "none"])
def test_ramps_rise_to_one_and_stay(ramp: str) -> None:
    values = [ramp_at(ConsistencySettings(ramp=ramp, ramp_fraction=0.5), step, 40) for step in range(40)]
    assert values == sorted(values) and 0 <= values[0] and values[20:] == [1.0] * 20


def test_no_ramp_and_a_ramp_of_no_length_give_one_from_the_start() -> None:
    assert ramp_at(ConsistencySettings(ramp="none"), 0, 10) == 1
    assert ramp_at(ConsistencySettings(ramp_fraction=0), 0, 10) == 1


def test_learning_rates_follow_their_formulas() -> None:
    for step in (0, 100, 599):
        assert learning_rate(OptimiserSettings(lr=0.02), step, 600) == pytest.approx(0.02 * (1 - step / 600) ** 0.9, abs=1e-15)
        assert learning_rate(OptimiserSettings(lr=0.02, schedule="cosine"), step, 600) == pytest.approx(0.01 * (1 + math.cos(math.pi * step / 600)), abs=1e-15)
        assert learning_rate(OptimiserSettings(lr=0.02, schedule="constant"), step, 600) == 0.02


def test_warmup_rises_linearly_to_the_schedule() -> None:
    settings = OptimiserSettings(lr=1.0, schedule="constant", warmup=3)
    assert [learning_rate(settings, step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_trunk_has_its_own_learning_rate_and_frozen_parameters_are_left_out(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[2].requires_grad_(False)
    optimiser = build_optimiser(OptimiserSettings(name=name, trunk_factor=0.1), model[0], model)
    set_learning_rate(optimiser, 0.5)
    assert [group["lr"] for group in optimiser.param_groups] == [pytest.approx(0.05), 0.5]
    grouped = [{id(p) for p in group["params"]} for group in optimiser.param_groups]
    assert grouped == [{id(p) for p in model[0].parameters()}, {id(p) for p in model[1].parameters()}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimiserSettings(name="adam"), "sgd, adamw"),
        (lambda: OptimiserSettings(schedule="step"), "poly, cosine, constant"),
        (lambda: OptimiserSettings(lr=0), "above 0"),
        (lambda: ConsistencySettings(weight=-1), "0 or more"),
        (lambda: ConsistencySettings(ramp="fast"), "exp, linear, cosine, none"),
        (lambda: ConsistencySettings(ramp_fraction=2), "0 to 1"),
    ],
)
def test_impossible_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
