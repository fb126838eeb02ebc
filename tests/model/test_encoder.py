"""Any timm backbone with any context gives features at the stride that was asked for, with norms as asked."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multidomain_cct.errors import UserError
from multidomain_cct.model.context import PyramidPooling
from multidomain_cct.model.encoder import Encoder, EncoderSettings
from multidomain_cct.model.norms import PerDomainNorm, Segments

TINY = "test_resnet"


def encoder(domains: tuple[str, ...] = ("a", "b"), **settings: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderSettings(**{"name": TINY, "width": 32, **settings}), domains)  # type: ignore[arg-type]


def pictures(count: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def refused(**settings: object) -> str:
    with pytest.raises(UserError) as caught:
        encoder(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Features


@pytest.mark.parametrize("norm", ["shared", "per_domain", "frozen"])
@pytest.mark.parametrize(
    ("context", "stride"), [("psp", 8), ("psp", 16), ("psp", 32), ("fpn", 4), ("fpn", 8), ("none", 8), ("none", 32)]
)
def test_features_lie_at_the_stride_have_the_width_and_are_not_negative(context: str, stride: int, norm: str) -> None:
    model = encoder(context=context, stride=stride, norm=norm)
    for mode in (True, False):
        features = model.train(mode)(pictures(4, 64, 96), [("a", 2), ("b", 2)])
        assert features.shape == (4, 32, 64 // stride, 96 // stride)
        assert features.min() >= 0
        assert features.isfinite().all()
        assert (features > 0).any()
    assert (model.stride, model.channels) == (stride, 32)


@pytest.mark.parametrize(
    ("name", "contexts"),
    [("test_vit", ["none", "psp"]), ("test_convnext", ["fpn", "psp"]), ("test_efficientnet", ["fpn", "psp"])],
)
def test_vits_at_their_patch_stride_and_other_cnns_work(name: str, contexts: list[str]) -> None:
    for context in contexts:
        features = encoder(name=name, context=context, stride=16)(pictures(2, 64, 48), [("a", 1), ("b", 1)])
        assert features.shape == (2, 32, 4, 3)
        assert features.min() >= 0


@pytest.mark.parametrize(("context", "stride"), [("psp", 8), ("fpn", 8), ("fpn", 4), ("none", 16)])
def test_every_weight_of_the_encoder_learns(context: str, stride: int) -> None:
    model = encoder(context=context, stride=stride)
    model(pictures(2), [("a", 2)]).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_levels_from_the_stride_to_32_are_fused() -> None:
    assert encoder(context="fpn", stride=8).plan.strides == (8, 16, 32)
    assert encoder(context="fpn", stride=16).plan.strides == (16, 32)


def test_images_are_normalised_with_the_backbones_own_mean_and_std() -> None:
    images = pictures(2)
    for name in ("resnet18", TINY):  # ImageNet's, and one half
        model = encoder(name=name, context="none", stride=32)
        seen: list[Tensor] = []
        model.backbone.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        model(images, [("a", 2)])
        facts = timm.get_pretrained_cfg(name)
        expected = (images.double().numpy() / 255 - np.reshape(facts.mean, (3, 1, 1))) / np.reshape(
            facts.std, (3, 1, 1)
        )
        np.testing.assert_allclose(seen[0].numpy(), expected, atol=1e-5)


def test_mean_and_std_are_no_part_of_what_is_saved() -> None:
    assert not [name for name in encoder(context="none").state_dict() if name.endswith((".mean", ".std"))]


@pytest.mark.parametrize(("channels", "size"), [(8, (6, 12)), (10, (5, 7)), (4, (1, 3))])
def test_pyramid_pooling_convolves_the_map_beside_its_averages_over_1_2_3_and_6_bins_a_side(
    channels: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    module = PyramidPooling([channels], 32, nn.BatchNorm2d).double()
    features = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    maps = [features]
    for bins, branch in zip((1, 2, 3, 6), module.branches, strict=True):
        means = nn.functional.adaptive_avg_pool2d(features, bins)
        maps.append(nn.functional.interpolate(branch(means), size=size, mode="bilinear", align_corners=False))
    expected = module.fuse(torch.cat(maps, dim=1))
    found = module([features])
    assert found.shape == (2, 32, *size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    factors = torch.randn_like(expected)
    inputs = [features, *module.parameters()]
    for own, other in zip(
        torch.autograd.grad(found, inputs, factors), torch.autograd.grad(expected, inputs, factors), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12 * max(1.0, float(other.abs().max())))


# Norms


def test_per_domain_norms_equal_a_batch_norm_of_each_domains_images() -> None:
    torch.manual_seed(0)
    start = nn.BatchNorm2d(4).double()
    nn.init.uniform_(start.weight)
    nn.init.uniform_(start.bias)
    alone = {name: copy.deepcopy(start) for name in ("a", "b")}
    segments = Segments()
    together = PerDomainNorm(start, ("a", "b"), segments)
    parts = (("a", 2), ("b", 3), ("a", 1), ("b", 2))  # labelled and unlabelled images stand apart
    owner = np.repeat([name for name, _ in parts], [count for _, count in parts])
    for step in range(2):
        features = torch.randn(8, 4, 3, 5, dtype=torch.float64) * (1 + step) + 7 * torch.from_numpy(owner == "b").view(
            8, 1, 1, 1
        )
        segments.parts = parts
        found = together(features)
        for name, norm in alone.items():
            own = features[owner == name]
            torch.testing.assert_close(found[owner == name], norm(own), rtol=1e-12, atol=1e-12)
            z = own.numpy()
            normed = (z - z.mean(axis=(0, 2, 3), keepdims=True)) / np.sqrt(
                z.var(axis=(0, 2, 3), keepdims=True) + start.eps
            )
            expected = normed * start.weight.detach().numpy().reshape(4, 1, 1) + start.bias.detach().numpy().reshape(
                4, 1, 1
            )
            np.testing.assert_allclose(found[owner == name].detach().numpy(), expected, atol=1e-10)
    for name, norm in alone.items():
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(together.norms[name].state_dict()[key], value, rtol=1e-12, atol=1e-12)
    together.eval()
    torch.testing.assert_close(
        together(features)[owner == "b"], alone["b"].eval()(features[owner == "b"]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("context", ["psp", "fpn", "none"])
@pytest.mark.parametrize(("norm", "leaks"), [("shared", True), ("per_domain", False), ("frozen", False)])
def test_only_shared_norms_let_other_domains_change_a_domains_features(context: str, norm: str, leaks: bool) -> None:
    model = encoder(context=context, norm=norm).train()
    own = pictures(2)
    features = []
    for other in (pictures(2, seed=1), pictures(2, seed=2) // 4):
        fresh = copy.deepcopy(model)
        features.append(fresh(torch.cat([own, other]), [("a", 2), ("b", 2)])[:2])
    assert (not torch.allclose(*features, atol=1e-4)) == leaks


def test_each_domain_has_norms_of_its_own_throughout() -> None:
    model = encoder(norm="per_domain")
    plain = [module for module in encoder(norm="shared").modules() if isinstance(module, nn.BatchNorm2d)]
    split = [module for module in model.modules() if isinstance(module, PerDomainNorm)]
    assert len(split) == len(plain) > 15
    assert all(list(module.norms) == ["a", "b"] for module in split)


def test_batch_norms_that_carry_their_activation_keep_it() -> None:
    torch.manual_seed(0)
    models = [encoder(name="test_efficientnet", context="none", norm=norm).eval() for norm in ("shared", "per_domain")]
    images = pictures(2)
    torch.testing.assert_close(*(model(images, [("a", 1), ("b", 1)]) for model in models))


def test_frozen_norms_of_the_backbone_stay_as_loaded_while_the_rest_learns() -> None:
    model = encoder(norm="frozen").train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert any(isinstance(module, nn.GroupNorm) for module in model.context.modules())
    norms = {name: module for name, module in model.backbone.named_modules() if hasattr(module, "running_mean")}
    assert len(norms) > 10
    assert not any(True for module in norms.values() for _ in module.parameters())
    for module in norms.values():
        module.weight.uniform_(0.5, 1.5)  # timm starts residual branches at 0
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pictures(3), [("a", 3)]).square().mean().backward()
    optimiser.step()
    after = model.state_dict()
    of_norms = {f"backbone.{name}.{key}" for name, module in norms.items() for key in module.state_dict()}
    assert all(torch.equal(before[key], after[key]) for key in of_norms)
    assert {key for key in after if torch.equal(before[key], after[key])} <= of_norms


def test_frozen_norms_give_the_same_features_in_training_and_evaluation() -> None:
    model = encoder(norm="frozen")
    images = pictures(2)
    assert torch.equal(model.train()(images, [("a", 2)]), model.eval()(images, [("a", 2)]))


def levit(**settings: object) -> Encoder:
    """A backbone with batch norms of (B n, D) tokens, that takes one image size."""
    torch.manual_seed(0)
    options = {"name": "levit_128s", "stride": 16, "context": "fpn", "width": 32, **settings}
    return Encoder(EncoderSettings(**options), ("a", "b"), [(64, 64)])  # type: ignore[arg-type]


def test_batch_norms_of_tokens_are_split_by_domain_too() -> None:
    model = levit(norm="per_domain").train()
    images = pictures(4)
    model(images, [("a", 3), ("b", 1)])
    alone = levit(norm="per_domain").train()
    alone(images[:3], [("a", 3)])
    after, expected = model.state_dict(), alone.state_dict()
    of_a = [key for key in after if ".norms.a.running" in key]
    assert any("attn" in key for key in of_a)
    assert not [
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d) and ".norms." not in name
    ]
    for key in of_a:
        torch.testing.assert_close(after[key], expected[key], msg=key)


def test_batch_norms_of_tokens_are_frozen_too() -> None:
    model = levit(norm="frozen").train()
    before = copy.deepcopy(model.state_dict())
    features = model(pictures(3), [("a", 3)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(features, model.eval()(pictures(3), [("a", 3)]))
    assert not [
        name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad and ".bn." in name
    ]


def test_a_backbone_with_channels_last_gives_the_same_features_as_its_getter() -> None:
    model = encoder(name="test_mambaout", context="fpn", stride=8)
    assert model.plan.channels_last
    assert model(pictures(2), [("a", 2)]).shape == (2, 32, 8, 8)


def test_weights_of_five_dimensions_are_left_alone() -> None:
    model = encoder(name="lambda_resnet26t", context="fpn", stride=8)
    assert any(parameter.ndim == 5 for parameter in model.parameters())
    assert model.eval()(pictures(1, 64, 96), [("a", 1)]).shape == (1, 32, 8, 12)


def test_weights_that_layers_share_are_saved_and_loaded(tmp_path: Path) -> None:
    settings = EncoderSettings("coat_tiny", stride=32, context="none", width=32)
    models = [Encoder(settings, ["a"], [(32, 64)]).eval() for _ in range(2)]
    weights = models[0].state_dict()
    assert len(weights) > len(list(models[0].named_parameters())) + len(list(models[0].named_buffers()))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "weights.safetensors")
    models[1].load_state_dict(load_file(tmp_path / "weights.safetensors"))
    images = pictures(1, 32, 64)
    torch.testing.assert_close(models[1](images, [("a", 1)]), models[0](images, [("a", 1)]))


def test_buffers_keep_their_shapes_when_the_encoder_is_used() -> None:
    # It makes its relative positions in the first forward pass.
    model = Encoder(EncoderSettings("convit_tiny", stride=16, context="none", width=32), ["a"], [(64, 64)])
    before = [buffer.shape for buffer in model.buffers()]
    model(pictures(2), [("a", 2)])
    assert [buffer.shape for buffer in model.buffers()] == before


def test_weights_that_a_backbone_keeps_fixed_stay_so() -> None:
    model = encoder(name="efficientvim_m1", stride=16, context="fpn")
    fixed = {name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad}
    assert fixed - model.plan.unused


# What is refused


def test_a_backbone_that_cannot_compute_activations_again_is_refused() -> None:
    assert refused(name="hrnet_w18_small", context="fpn", checkpoint=True) == (
        "encoder.checkpoint is set, but timm has none for hrnet_w18_small. Leave it out."
    )


@pytest.mark.parametrize(
    ("settings", "key", "remedy"),
    [
        ({"stride": 0}, "encoder.stride is 0", "at least 1"),
        ({"width": 100}, "encoder.width is 100", "multiple of 32"),
        ({"width": 0}, "encoder.width is 0", "multiple of 32"),
        ({"context": "aspp"}, "encoder.context is 'aspp'", "psp, fpn, none"),
        ({"checkpoint": True, "norm": "per_domain"}, "encoder.checkpoint", "encoder.norm=shared or frozen"),
        ({"checkpoint": True, "compile": True}, "encoder.checkpoint and encoder.compile", "choose one"),
        ({"norm": "group"}, "encoder.norm is 'group'", "shared, per_domain, frozen"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_remedy(
    settings: dict[str, object], key: str, remedy: str
) -> None:
    message = refused(**settings)
    assert message.startswith(key)
    assert remedy in message


def test_parameters_that_reach_no_map_are_frozen() -> None:
    built = encoder(name="hrnet_w18_small", stride=8, context="fpn", width=32)
    built(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), [("a", 1)]).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in built.parameters())
    assert not all(parameter.requires_grad for parameter in built.parameters())


# Less memory, or less time


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("test_resnet", "fpn"),
        ("tf_efficientnet_lite0", "fpn"),
        ("test_resnet", "psp"),
        ("test_vit", "none"),
        ("levit_128s", "fpn"),
    ],
)
@pytest.mark.parametrize("norm", ["shared", "frozen"])
def test_activations_that_are_computed_again_change_nothing(name: str, context: str, norm: str) -> None:
    stride = 8 if name in ("test_resnet", "tf_efficientnet_lite0") else 16
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        settings = EncoderSettings(name, stride=stride, context=context, width=32, norm=norm, checkpoint=checkpoint)
        model = Encoder(settings, ["a"], [(64, 64)]).train()
        for _ in range(2):
            torch.manual_seed(1)  # of stochastic depth
            model.zero_grad()
            features = model(pictures(3), [("a", 3)])
            features.square().mean().backward()
        state = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
        found.append((features, {key: parameter.grad for key, parameter in model.named_parameters()}, state))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_activations_that_are_computed_again_are_not_kept() -> None:
    def kept(checkpoint: bool) -> int:
        total = 0

        model = encoder(name="resnet18", checkpoint=checkpoint).train()
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += 0 if tensor.data_ptr() in weights else tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(pictures(2), [("a", 2)])
        return total

    assert kept(True) < 0.7 * kept(False)


def test_a_compiled_encoder_gives_the_same_features_and_evaluates_uncompiled() -> None:
    torch.manual_seed(0)
    plain = encoder(norm="frozen").train()
    compiled = encoder(norm="frozen", compile=True).train()
    compiled.load_state_dict(plain.state_dict())
    calls = []
    whole = compiled.compiled
    assert whole is not None
    compiled.compiled = lambda images: (calls.append(len(images)), whole(images))[1]
    images = pictures(2)
    torch.testing.assert_close(compiled(images, [("a", 2)]), plain(images, [("a", 2)]), rtol=1e-4, atol=1e-5)
    compiled.eval()(images, [("a", 2)])
    assert calls == [2]
    assert compiled.state_dict().keys() == plain.state_dict().keys()
