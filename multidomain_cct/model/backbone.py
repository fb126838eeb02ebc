"""timm's backbones: the options that give the levels that are needed, and the image sizes that they take.

Options are tried on torch's meta device, where tensors have shapes but no numbers: nothing is computed.

Shapes: B images, H W image size. Levels come finest first.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor

from multidomain_cct.errors import UserError
from multidomain_cct.model.weights import initial_weights

Size = tuple[int, int]
"""(H, W) in pixels."""
_ANY_SIZE: tuple[dict[str, Any], ...] = ({}, {"dynamic_img_size": True}, {"strict_img_size": False})
"""timm's options for images of every size, in the order in which they are tried."""
_WRAPPERS: tuple[dict[str, Any], ...] = ({}, {"feature_cls": "getter"})
_ANOTHER = "Use another encoder; docs/encoders.md has those that work."
_ONE_SIZE, _CROP = 1, 2
"""How far an attempt came, beyond 0."""


@dataclass(frozen=True)
class BackbonePlan:
    """How timm builds a backbone, and what it takes and gives."""

    options: Mapping[str, Any]
    """Of timm.create_model."""
    strides: tuple[int, ...]
    """Of the levels that it returns."""
    channels: tuple[int, ...]
    channels_last: bool
    """Whether levels are (B, h, w, D), not (B, D, h, w)."""
    unit: int
    """The sides of images are multiples of it."""
    size: Size | None
    """Of all images, if it takes one size only."""
    unused: frozenset[str]
    """Parameters that reach no level. DDP would wait for their gradients."""
    depths: Mapping[str, int]
    """Layers above each parameter, 0 for the last; empty for backbones whose layers timm does not tell."""


def plan_backbone(name: str, context: str, stride: int, crops: tuple[Size, ...] = ()) -> BackbonePlan:
    """The backbone for a context module, with the finest or only level at `stride`, that takes images of the `crops`.

    The context `all` reads every level without dilation. Raises UserError, with settings that work if there are any.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(
            f"encoder.name is {name!r}, which timm does not know. Nearest: {', '.join(near) or 'none'}. "
            "All: timm.list_models()."
        )
    # Some constructors draw random numbers even here.
    with torch.random.fork_rng(devices=[]):
        found = _find(name, context, stride, crops)
        if isinstance(found, BackbonePlan):
            return found
        raise UserError(f"encoder.name is {name!r}: {found}. {_advice(name, context, stride, crops)}")


def create_backbone(name: str, options: Mapping[str, Any], weights: str) -> Any:
    """timm's feature extractor with the weights `none`, `timm`, `lite` or of a file.

    Raises UserError without them, and when timm cannot bring those of another image size to that of `options`.
    """
    pretrained: dict[str, Any] = {"pretrained": weights != "none"}
    if weights not in ("none", "timm"):
        pretrained["pretrained_cfg_overlay"] = {"state_dict": initial_weights(weights, name)}
    try:
        with _quiet_loading():
            return timm.create_model(name, **options, **pretrained)
    except (OSError, RuntimeError) as error:
        if "img_size" in options and "size mismatch" in str(error):
            (height, width), own = options["img_size"], _default_size(name)
            raise UserError(
                f"encoder.weights={weights}: the weights of {name} have tables of positions for images of "
                f"{own[1]}x{own[0]}, which timm cannot bring to the crop [{width}, {height}]. "
                f"Use data.crop=[{own[1]}, {own[0]}] or another encoder."
            ) from None
        if weights != "timm":
            raise
        raise UserError(
            f"encoder.weights=timm: the weights of {name} could not be had from the model hub ({_reason(error)}). "
            "Download them elsewhere and name the .safetensors file, or use weights `lite` or `none`."
        ) from None


class _UnfitError(Exception):
    """Why there is no such backbone."""

    def __init__(self, reason: str, progress: int = 0) -> None:
        super().__init__(reason)
        self.progress = progress
        """How far the attempt came: of several, the reason of the one that came farthest is told."""


@lru_cache(maxsize=256)
def _find(name: str, context: str, stride: int, crops: tuple[Size, ...]) -> BackbonePlan | str:
    """The plan, or why there is none."""
    try:
        options = _level_options(_levels(name), context, stride)
    except _UnfitError as error:
        return str(error)
    sizes: list[tuple[dict[str, Any], Size | None]] = [(each, None) for each in _ANY_SIZE]
    if len(set(crops)) == 1:
        sizes += [({"img_size": crops[0]}, crops[0]), ({}, crops[0])]
    failures: list[_UnfitError] = []
    for size_options, size in sizes:
        for wrapper in _WRAPPERS:
            try:
                return _try(name, {"features_only": True} | options | size_options | wrapper, stride, size, crops)
            except _UnfitError as error:
                failures.append(error)
        if all(error.progress < _ONE_SIZE for error in failures):
            break  # other sizes would not help
    return str(max(failures, key=lambda error: error.progress))


def finest_stride(name: str) -> int:
    """Of the levels of a timm model. Raises UserError when it has none."""
    try:
        return min(_levels(name).values())
    except _UnfitError as error:
        raise UserError(f"encoder.name is {name!r}: {error}. {_ANOTHER}") from None


@lru_cache(maxsize=64)
def _levels(name: str) -> dict[int, int]:
    """The stride of each level by its number. A plain ViT has one level at each block."""
    try:
        with torch.device("meta"):
            info = timm.create_model(name, features_only=True).feature_info
    except Exception as error:  # whatever a constructor raises
        raise _UnfitError(f"it gives no feature maps ({_reason(error)})") from error
    return {number: level["reduction"] for number, level in enumerate(info.info)}


def _level_options(levels: Mapping[int, int], context: str, stride: int) -> dict[str, Any]:
    """timm's options for the levels that a context module reads."""
    strides, last = list(dict.fromkeys(levels.values())), max(levels)
    if context == "all":
        return {"out_indices": tuple(levels)}
    if context == "fpn":
        if len(strides) == 1:
            return {"out_indices": _four_blocks(len(levels), strides[0], stride)}
        if stride not in strides or stride > 32:
            raise _UnfitError(f"encoder.stride is {stride}, but it has levels at the strides {strides}")
        return {"out_indices": tuple(number for number, level in levels.items() if stride <= level <= 32)}
    if levels[last] == stride:
        return {"out_indices": (last,)}
    if len(strides) > 1 and stride in (8, 16) and stride < levels[last]:
        return {"out_indices": (last,), "output_stride": stride}
    raise _UnfitError(f"encoder.stride is {stride}, but its last level is at stride {levels[last]}")


def _four_blocks(depth: int, patch: int, stride: int) -> tuple[int, ...]:
    """The last of each quarter of a ViT's blocks, for a feature pyramid with its finest level at `stride`."""
    finest = [patch // factor for factor in (1, 2, 4) if patch % factor == 0]
    if stride not in finest:
        allowed = ", ".join(map(str, finest))
        raise _UnfitError(f"encoder.stride is {stride}; with `fpn` its patches of {patch} pixels allow {allowed}")
    if depth < 4:
        raise _UnfitError(f"encoder.context is `fpn`, which reads four levels of a ViT, but it has {depth} blocks")
    return tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


def _try(name: str, options: dict[str, Any], stride: int, size: Size | None, crops: tuple[Size, ...]) -> BackbonePlan:
    """The backbone with these options, for images of any size or of one."""
    try:
        with torch.device("meta"):
            backbone = timm.create_model(name, **options).eval()
    except Exception as error:  # above all a TypeError for options that a constructor does not have
        raise _UnfitError(f"it cannot be built with stride {stride} ({_reason(error)})") from error
    unit = stride if size else _unit(backbone, stride, name)
    for height, width in crops:
        if size is None and (height % unit or width % unit):
            raise _UnfitError(f"sides of its images are multiples of {unit}, but a crop is [{width}, {height}]", _CROP)
        _maps(backbone, (height, width))
    maps, channels_last = _maps(backbone, size or (2 * unit, 3 * unit))
    if size is None and not any(options.keys() & promise for promise in _ANY_SIZE):
        _require_larger(name, options, unit)
    parameters = {key: parameter for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(
        [level.sum() for level in maps], list(parameters.values()), allow_unused=True, materialize_grads=False
    )
    return BackbonePlan(
        options=options,
        strides=tuple(backbone.feature_info.reduction()),
        channels=tuple(level.shape[-1 if channels_last else 1] for level in maps),
        channels_last=channels_last,
        unit=unit,
        size=size,
        unused=frozenset(key for key, gradient in zip(parameters, gradients, strict=True) if gradient is None),
        depths=_depths(backbone),
    )


def _depths(backbone: Any) -> dict[str, int]:
    """Layers above each parameter of the model that an extractor wraps."""
    model: Any = getattr(backbone, "model", None)
    if not hasattr(model, "group_matcher"):
        return {}
    layers: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return {f"model.{key}": max(layers.values()) - layer for key, layer in layers.items()}


def _unit(backbone: Any, stride: int, name: str) -> int:
    """The smallest of the tried multiples of the stride whose multiples, odd ones included, are sides of images."""

    def failure(*sizes: Size) -> _UnfitError | None:
        try:
            for size in sizes:
                _maps(backbone, size)
        except _UnfitError as error:
            return error
        return None

    height, width = default = _default_size(name)
    units = sorted({unit for power in range(7) if (unit := stride << power) <= 512} | {max(default)})
    largest = failure((units[-1], units[-1]))
    if largest is not None and failure((2 * height, 2 * width)) is not None:
        raise largest if failure(default) else _UnfitError(f"it takes images of {width}x{height} only", _ONE_SIZE)
    for unit in units:
        if failure((unit, unit), (3 * unit, 5 * unit)) is None:
            return unit
    raise _UnfitError("it takes no images of odd sizes", _ONE_SIZE)


def _require_larger(name: str, options: Mapping[str, Any], unit: int) -> None:
    """Try a computed image larger than the default: tables of positions that end there do not show on shapes."""
    default = _default_size(name)
    larger = [(side // unit + 1) * unit for side in default]
    try:
        with torch.device("meta"):
            models = [
                timm.create_model(name, **options, img_size=size)
                for size in (default, (2 * default[0], 2 * default[1]))
            ]
    except Exception:  # whatever a constructor raises that has no such option: it has no tables either
        return
    shapes = [[tensor.shape for tensor in model.state_dict().values()] for model in models]
    if shapes[0] == shapes[1]:
        return
    try:
        with torch.inference_mode():
            timm.create_model(name, **options).eval()(torch.zeros(1, 3, *larger))
    except Exception as error:  # whatever a layer raises that the size does not suit
        width, height = default[::-1]
        reason = f"it takes images of up to {width}x{height} ({_reason(error)})"
        raise _UnfitError(reason, _ONE_SIZE) from error


def _maps(backbone: Any, size: Size) -> tuple[list[Tensor], bool]:
    """The levels of a blank image, and whether they have their channels last."""
    strides = backbone.feature_info.reduction()
    try:
        maps = [torch.as_tensor(level) for level in backbone(torch.empty(1, 3, *size, device="meta"))]
    except Exception as error:  # whatever a layer raises that the size does not suit
        raise _UnfitError(f"it does not take images of {size[1]}x{size[0]} ({_reason(error)})") from error
    shapes = [tuple(level.shape) for level in maps]
    # The finest level is at the stride exactly: decoders enlarge it to the image.
    grids = [(-(-size[0] // level), -(-size[1] // level)) for level in strides]
    if not any(side % strides[0] for side in size) and len(shapes) == len(grids):
        for channels_last, axis in ((False, 2), (True, 1)):
            if [shape[axis : axis + 2] for shape in shapes if len(shape) == 4] == grids:
                return maps, channels_last
    raise _UnfitError(f"its features have the shapes {shapes}, not the grids {grids}, for {size[1]}x{size[0]}")


def _default_size(name: str) -> Size:
    height, width = timm.get_pretrained_cfg(name).input_size[1:]
    return height, width


def _advice(name: str, context: str, stride: int, crops: tuple[Size, ...]) -> str:
    """Settings that work in place of those that do not."""
    try:
        strides = set(_levels(name).values())
    except _UnfitError:
        strides = set()
    if not strides or context == "all":
        return _ANOTHER
    near = sorted({*strides, 8, 16, 32}, key=lambda other: abs(other - stride))[:3]
    settings = dict.fromkeys([(context, stride), *((own, each) for own in (context, "fpn", "psp") for each in near)])
    # First with the crops as they are, then with crops as they would have to be.
    for own, each in settings:
        use = "" if (own, each) == (context, stride) else f" encoder.context={own} encoder.stride={each}"
        for sizes in dict.fromkeys((crops, (), (_default_size(name),))):
            plan = _find(name, own, each, sizes)
            if isinstance(plan, str):
                continue
            if sizes == crops:
                return f"Use{use}."
            unit = plan.unit
            wanted = [[max(1, round(side / unit)) * unit for side in size[::-1]] for size in sizes or crops]
            return f"Use{use}{' data.crop=' if len(wanted) == 1 else ' crops of '}{', '.join(map(str, wanted))}."
    return _ANOTHER


def _reason(error: Exception) -> str:
    """The first line of what an error says, with its class."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:200]


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without notices about the unused classifier and each retried download; what matters is checked or raised."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
