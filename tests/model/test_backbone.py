"""A backbone is planned on shapes alone: which options timm needs, and which image sizes fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from multidomain_cct.errors import UserError
from multidomain_cct.model.backbone import BackbonePlan, Size, create_backbone, plan_backbone


def refused(name: str, context: str = "fpn", stride: int = 8, crops: tuple[Size, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        plan_backbone(name, context, stride, crops)
    message = str(caught.value)
    assert message.startswith(f"encoder.name is {name!r}")
    assert "\n" not in message
    return message


def levels(name: str, plan: BackbonePlan, size: Size) -> list[tuple[int, int]]:
    """The sizes of the levels of a real backbone."""
    maps = create_backbone(name, plan.options, "none").eval()(torch.zeros(1, 3, *size))
    return [tuple(level.shape[1:3] if plan.channels_last else level.shape[2:]) for level in maps]


@pytest.mark.parametrize(
    ("name", "context", "stride", "unit"),
    [
        ("test_resnet", "fpn", 8, 8),
        ("test_resnet", "psp", 16, 16),
        ("test_convnext", "fpn", 8, 32),  # its convolutions leave out what is no whole patch
        ("test_mambaout", "fpn", 8, 8),
        ("hrnet_w18_small", "fpn", 8, 32),
        ("halonet26t", "psp", 8, 64),  # blocks of 8 x 8 positions
        ("mobilevitv2_050", "psp", 32, 64),
        ("test_vit", "none", 16, 16),
        ("swin_tiny_patch4_window7_224", "fpn", 8, 8),
    ],
)
def test_images_of_every_multiple_of_the_unit_fit(name: str, context: str, stride: int, unit: int) -> None:
    plan = plan_backbone(name, context, stride)
    assert (plan.unit, plan.size) == (unit, None)


@pytest.mark.parametrize(
    ("name", "context", "stride", "size"),
    [("test_convnext", "fpn", 8, (96, 160)), ("test_mambaout", "fpn", 4, (28, 52)), ("test_vit", "psp", 16, (48, 16))],
)
def test_a_planned_backbone_gives_levels_at_its_strides(name: str, context: str, stride: int, size: Size) -> None:
    plan = plan_backbone(name, context, stride)
    assert levels(name, plan, size) == [(-(-size[0] // level), -(-size[1] // level)) for level in plan.strides]


@pytest.mark.parametrize(
    ("name", "context", "stride"),
    [
        ("test_maxvit", "fpn", 8),
        ("beit_base_patch16_224", "none", 16),
        ("levit_128s", "fpn", 16),
        ("hiera_tiny_224", "fpn", 4),
        ("mvitv2_tiny", "fpn", 16),  # its tables of positions end at 224 pixels, which shapes do not show
    ],
)
def test_a_backbone_of_one_image_size_takes_that_of_the_crop(name: str, context: str, stride: int) -> None:
    plan = plan_backbone(name, context, stride, ((64, 96),))
    assert plan.size == (64, 96)
    if name == "test_maxvit":
        assert levels(name, plan, (64, 96)) == [(8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(
    ("name", "context", "stride", "crops", "reason"),
    [
        ("test_resnet", "psp", 4, (), "encoder.stride is 4, but its last level is at stride 32"),
        ("test_resnet", "fpn", 12, (), "levels at the strides [2, 4, 8, 16, 32]"),
        ("test_vit", "none", 8, (), "encoder.stride is 8, but its last level is at stride 16"),
        ("test_vit", "fpn", 32, (), "its patches of 16 pixels allow 16, 8, 4"),
        ("test_mambaout", "psp", 8, (), "it cannot be built with stride 8"),
        ("levit_128s", "psp", 32, ((224, 224),), "its last level is at stride 64"),
        ("selecsls42", "psp", 32, ((224, 224),), "its last level is at stride 64"),
        ("test_convnext", "fpn", 8, ((72, 72),), "multiples of 32, but a crop is [72, 72]"),
        ("test_convnext", "fpn", 8, ((64, 64), (70, 98)), "multiples of 32, but a crop is [98, 70]"),
        ("beit_base_patch16_224", "none", 16, ((64, 96), (96, 96)), "it takes images of 224x224 only"),
    ],
)
def test_what_does_not_fit_is_answered_with_settings_that_do(
    name: str, context: str, stride: int, crops: tuple[Size, ...], reason: str
) -> None:
    message = refused(name, context, stride, crops)
    assert reason in message
    advice = message[message.index(" Use ") :]
    if changed := re.search(r"encoder.context=(\w+) encoder.stride=(\d+)", advice):
        context, stride = changed[1], int(changed[2])
    sizes = tuple((int(height), int(width)) for width, height in re.findall(r"\[(\d+), (\d+)\]", advice))
    plan_backbone(name, context, stride, sizes or crops)


def test_a_backbone_without_maps_at_its_strides_is_refused() -> None:
    assert refused("crossvit_tiny_240", "fpn", 12).endswith(
        "Use another encoder; docs/encoders.md has those that work."
    )


def test_weights_of_another_image_size_are_refused_with_the_crop_that_they_fit(tmp_path: Path) -> None:
    file, name = tmp_path / "weights.safetensors", "levit_128s"
    save_file(timm.create_model(name).state_dict(), file)
    with pytest.raises(UserError, match=r"^encoder\.weights=.* the crop \[96, 64\]\. Use data\.crop=\[224, 224\]"):
        create_backbone(name, plan_backbone(name, "fpn", 16, ((64, 96),)).options, str(file))
    create_backbone(name, plan_backbone(name, "fpn", 16, ((224, 224),)).options, str(file))


def test_weights_that_a_backbone_keeps_fixed_are_not_among_the_unused() -> None:
    fixed = {name for name, parameter in _parameters("efficientvim_m1") if not parameter.requires_grad}
    assert fixed
    assert not fixed & plan_backbone("efficientvim_m1", "fpn", 16).unused


def _parameters(name: str) -> list[tuple[str, torch.nn.Parameter]]:
    with torch.device("meta"):
        return list(timm.create_model(name, features_only=True).named_parameters())


@pytest.mark.parametrize(("name", "near"), [("resnet5", "resnet50"), ("tf_eficientnet_lite0", "tf_efficientnet_lite0")])
def test_an_encoder_that_timm_does_not_know_is_told_the_nearest_names(name: str, near: str) -> None:
    message = refused(name)
    assert message.startswith(f"encoder.name is {name!r}, which timm does not know. Nearest: ")
    assert near in message


def test_a_name_near_nothing_says_so() -> None:
    assert "Nearest: none. All: timm.list_models()." in refused("0123456789")
