"""ViTs give a pyramid from four of their blocks, at their patch size or finer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multidomain_cct.data.specification import domain_folders, find_domain
from multidomain_cct.errors import UserError
from multidomain_cct.model import backbone
from multidomain_cct.model.backbone import plan_backbone
from multidomain_cct.model.context import TokenPyramid
from multidomain_cct.model.encoder import Encoder, EncoderSettings
from multidomain_cct.training.build import build_model
from multidomain_cct.training.recipe import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
VIT = {"name": "vit_tiny_patch16_224", "context": "fpn", "width": 32, "norm": "frozen"}


def encoder(**settings: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderSettings(**(VIT | settings)), ("a",))  # type: ignore[arg-type]


def pictures(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("stride", [16, 8, 4])
@pytest.mark.parametrize(("height", "width"), [(64, 48), (96, 128)])
def test_features_of_a_vit_lie_at_its_patch_size_or_finer(stride: int, height: int, width: int) -> None:
    model = encoder(stride=stride)
    features = model(pictures(height, width), [("a", 2)])
    assert features.shape == (2, 32, height // stride, width // stride)
    assert features.min() >= 0
    features.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(("name", "blocks"), [("vit_tiny_patch16_224", (2, 5, 8, 11)), ("test_vit2", (1, 3, 5, 7))])
def test_the_last_block_of_each_quarter_is_read(name: str, blocks: tuple[int, ...]) -> None:
    assert plan_backbone(name, "fpn", 16).options["out_indices"] == blocks


def test_levels_are_enlarged_by_the_factor_and_its_half_and_added() -> None:
    module = TokenPyramid([8, 8, 8, 8], 32, nn.BatchNorm2d, factor=4).eval()
    levels = [torch.randn(1, 8, 3, 5) for _ in range(4)]
    sizes = [module.enlarge[number](levels[number]).shape for number in range(2)]
    assert sizes == [(1, 32, 12, 20), (1, 32, 6, 10)]
    whole = module(levels)
    assert whole.shape == (1, 32, 12, 20)
    for number in range(4):
        others = [level if place != number else torch.zeros_like(level) for place, level in enumerate(levels)]
        assert not torch.allclose(module(others), whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 32}, "encoder.stride is 32; with `fpn` its patches of 16 pixels allow 16, 8, 4"),
        ({"name": "vit_small_patch14_dinov2", "stride": 8}, "its patches of 14 pixels allow 14, 7"),
    ],
)
def test_vits_that_do_not_give_the_levels_are_refused_in_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        encoder(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_a_frozen_backbone_stays_as_it_is_while_the_rest_learns(name: str) -> None:
    model = encoder(name=name, stride=8, norm="shared", freeze=True).train()
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    assert not model.backbone.training
    assert model.context.training
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(pictures(64, 64), [("a", 2)]).square().mean().backward()
    optimiser.step()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.context.parameters())
    for key, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_a_vit_of_fewer_than_four_blocks_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "_levels", lambda name: {0: 16, 1: 16, 2: 16})
    with pytest.raises(UserError, match="`fpn`, which reads four levels of a ViT, but it has 3 blocks"):
        plan_backbone("test_vit3", "fpn", 8)


@pytest.mark.parametrize("name", ["dinov2_small", "dinov3_small"])
def test_recipes_of_self_supervised_vits_are_exact_up_to_the_download(name: str) -> None:
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    domains = {domain: find_domain(domain, domain_folders()) for domain in recipe.domains}
    model = build_model(recipe, domains, pretrained=False).eval()
    patch = model.encoder.plan.strides[0]
    assert recipe.crop_of("pascal_voc")[0] % patch == 0
    with torch.inference_mode():
        for height, width in ((4 * patch, 6 * patch), (3 * patch + 5, 2 * patch + 1)):
            logits = model.logits(torch.zeros(1, 3, height, width, dtype=torch.uint8), "pascal_voc")
            assert logits.shape == (1, 21, height, width)
            assert logits.isfinite().all()
