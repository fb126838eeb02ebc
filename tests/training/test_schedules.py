import math

import pytest
import torch

from multidomain_cct.errors import UserError
from multidomain_cct.training.schedules import OptimiserSettings, build_optimiser, learning_rate, set_learning_rate


def test_learning_rates_follow_their_formulas() -> None:
    for step in (0, 100, 599):
        assert learning_rate(OptimiserSettings(lr=0.02), step, 600) == pytest.approx(
            0.02 * (1 - step / 600) ** 0.9, abs=1e-15
        )
        assert learning_rate(OptimiserSettings(lr=0.02, schedule="cosine"), step, 600) == pytest.approx(
            0.01 * (1 + math.cos(math.pi * step / 600)), abs=1e-15
        )
        assert learning_rate(OptimiserSettings(lr=0.02, schedule="constant"), step, 600) == 0.02


def test_warmup_rises_linearly_to_the_schedule() -> None:
    settings = OptimiserSettings(lr=1.0, schedule="constant", warmup=3)
    assert [learning_rate(settings, step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_backbone_has_its_own_learning_rate_and_frozen_parameters_are_left_out(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[2].requires_grad_(False)
    optimiser = build_optimiser(OptimiserSettings(name=name, backbone_factor=0.1), model[0], model)
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
    ],
)
def test_impossible_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]
