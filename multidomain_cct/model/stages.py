"""Every level of a backbone, also those that no context module reads, for the diagnosis of smoothness.

Shapes: D feature channels, H W image size, h w feature size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from multidomain_cct.errors import UserError
from multidomain_cct.model.backbone import BackbonePlan, create_backbone, finest_stride, plan_backbone
from multidomain_cct.model.encoder import Encoder, EncoderSettings, Normalise, use_channels_last
from multidomain_cct.model.norms import Segments, freeze_batch_norms, split_batch_norms


class Stages(nn.Module):
    """The levels of a backbone in evaluation mode, one image at a time."""

    def __init__(self, backbone: Any, plan: BackbonePlan) -> None:
        """Raises UserError for a backbone that takes images of one size only."""
        super().__init__()
        if plan.size is not None:
            raise UserError(
                "the encoder takes images of one size only, which cannot be diagnosed. Use another encoder."
            )
        self.plan = plan
        self.backbone = backbone.eval().requires_grad_(False)
        self.strides: tuple[int, ...] = tuple(backbone.feature_info.reduction())
        self.channels: tuple[int, ...] = tuple(backbone.feature_info.channels())
        use_channels_last(self)
        self.normalise = Normalise(backbone)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(1, D, h, w) features of each level, finest first, of a (1, 3, H, W) image with sides that fit the plan."""
        levels: list[Tensor] = self.backbone(self.normalise(images))
        return [level.permute(0, 3, 1, 2) if self.plan.channels_last else level for level in levels]


def model_stages(name: str, weights: str) -> Stages:
    """The levels of a published timm model, without dilation; of a plain ViT, every block.

    `weights` as in EncoderSettings; timm knows the name. Raises UserError for a model without feature maps and for
    weights that do not fit.
    """
    plan = plan_backbone(name, "all", finest_stride(name))
    return Stages(create_backbone(name, plan.options, weights), plan)


def encoder_stages(encoder: Encoder, settings: EncoderSettings, *, domain: str, domains: Iterable[str]) -> Stages:
    """The levels of an encoder's backbone up to the last that it reads, with copies of its weights; of per-domain norms
    those of `domain`.
    """
    levels = {"out_indices": tuple(range(max(encoder.backbone.feature_info.out_indices) + 1))}
    plan = replace(encoder.plan, options=dict(encoder.plan.options) | levels)
    backbone = create_backbone(settings.name, plan.options, "none")
    if settings.norm == "frozen":
        backbone = freeze_batch_norms(backbone)
    if settings.norm == "per_domain":
        segments = Segments()
        segments.parts = ((domain, 1),)
        split_batch_norms(backbone, tuple(domains), segments)
    backbone.load_state_dict(encoder.backbone.state_dict())
    return Stages(backbone, plan)
