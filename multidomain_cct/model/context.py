"""Context modules: the levels of a trunk -> features of one width at the encoder's stride.

Shapes: B images, D feature channels, h w feature size. Levels come finest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.Module:
    """In place of a batch norm where batch statistics are poor: groups of 16 channels, or one."""
    return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels)


def _block(channels: int, width: int, kernel: int, normed: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False), normed(width), nn.ReLU())


class PyramidPooling(nn.Module):
    """The trunk's last map beside its averages over 1, 2, 3 and 6 bins a side, fused (PSPNet, as in the authors' code)."""

    BINS = (1, 2, 3, 6)

    def __init__(self, levels: Sequence[int], width: int, normed: Any) -> None:
        super().__init__()
        channels = levels[-1]
        self.branches = nn.ModuleList(_block(channels, channels // 4, 1, normed) for _ in self.BINS)
        self.fuse = _block(channels + len(self.BINS) * (channels // 4), width, 3, normed)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        top = levels[-1]
        size = top.shape[-2:]
        pooled = [
            F.interpolate(branch(F.adaptive_avg_pool2d(top, bins)), size=size, mode="bilinear", align_corners=False)
            for bins, branch in zip(self.BINS, self.branches, strict=True)
        ]
        fused: Tensor = self.fuse(torch.cat([top, *pooled], dim=1))
        return fused


class FeaturePyramid(nn.Module):
    """Every level projected to one width, brought to the finest one's resolution, added, and smoothed."""

    def __init__(self, levels: Sequence[int], width: int, normed: Any) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), normed(width)) for channels in levels)
        self.fuse = _block(width, width, 3, normed)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        size = levels[0].shape[-2:]
        total = self.laterals[0](levels[0])
        for lateral, level in zip(list(self.laterals)[1:], levels[1:], strict=True):
            total = total + F.interpolate(lateral(level), size=size, mode="bilinear", align_corners=False)
        fused: Tensor = self.fuse(F.relu(total))
        return fused


class Projection(nn.Module):
    """The trunk's last map, projected to the feature width."""

    def __init__(self, levels: Sequence[int], width: int, normed: Any) -> None:
        super().__init__()
        self.project = _block(levels[-1], width, 1, normed)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        projected: Tensor = self.project(levels[-1])
        return projected
