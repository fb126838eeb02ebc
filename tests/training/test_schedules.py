import math
from itertools import pairwise

import pytest
import torch

from multidomain_cct.errors import UserError
from multidomain_cct.model.backbone import create_backbone, plan_backbone
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


def test_with_a_layer_decay_every_layer_learns_less_than_the_next() -> None:
    plan = plan_backbone("vit_tiny_patch16_224", "fpn", 16)
    backbone = create_backbone("vit_tiny_patch16_224", plan.options, "none")
    model = torch.nn.ModuleDict({"backbone": backbone, "head": torch.nn.Linear(2, 2)})
    optimiser = build_optimiser(OptimiserSettings(backbone_factor=0.5, layer_decay=0.8), backbone, model, plan.depths)
    set_learning_rate(optimiser, 1.0)
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    rates = {names.get(id(p), "head"): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert rates["head"] == 1.0
    blocks = [rates[f"model.blocks.{number}.mlp.fc1.weight"] for number in range(12)]
    assert [late / early for early, late in pairwise(blocks)] == [pytest.approx(1.25)] * 11
    assert rates["model.patch_embed.proj.weight"] == pytest.approx(0.8 * blocks[0])
    assert blocks[-1] == pytest.approx(0.5 * 0.8 ** (plan.depths["model.blocks.11.mlp.fc1.weight"]))
    assert plan.depths["model.blocks.11.mlp.fc1.weight"] <= 1
    assert len(rates) == sum(1 for _ in model.parameters()) - 1  # weight and bias of the head have one name here


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimiserSettings(name="adam"), "sgd, adamw"),
        (lambda: OptimiserSettings(schedule="step"), "poly, cosine, constant"),
        (lambda: OptimiserSettings(lr=0), "above 0"),
        (lambda: OptimiserSettings(layer_decay=1.5), "optimiser.layer_decay"),
    ],
)
def test_impossible_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]
