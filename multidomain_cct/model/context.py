"""Context modules: the levels of a backbone -> features of one width at the encoder's stride.

Shapes: B images, L channels of the last level, D feature channels, h w feature size. Levels come finest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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
    """The backbone's last map beside its averages over 1, 2, 3 and 6 bins a side, fused by a 3x3 convolution.

    As in PSPNet and the authors' code. The averages, brought to the map's size, are half of that convolution's
    channels, yet hold a few cells each. Convolution and interpolation are linear, so each cell is multiplied by the
    weights once, and the products are spread over the positions: the same features for half of the multiplications.
    """

    BINS = (1, 2, 3, 6)

    def __init__(self, levels: Sequence[int], width: int, normed: Any) -> None:
        super().__init__()
        channels = levels[-1]
        self.branches = nn.ModuleList(_block(channels, channels // 4, 1, normed) for _ in self.BINS)
        self.fuse = _block(channels + len(self.BINS) * (channels // 4), width, 3, normed)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        top = levels[-1]
        images, channels, height, width = top.shape
        convolution, norm, activation = self.fuse
        sizes = [channels, *[channels // 4] * len(self.BINS)]
        of_top, *of_cells = torch.split(convolution.get_parameter("weight"), sizes, dim=1)
        products = []
        for bins, branch, weight in zip(self.BINS, self.branches, of_cells, strict=True):
            cells = branch(_averages(top, bins)).flatten(2).transpose(1, 2)  # (B, bins^2, L/4)
            # With channels last the weights are a view.
            taps = cells @ weight.permute(0, 2, 3, 1).flatten(0, 2).T  # (B, bins^2, 9 D)
            products.append(taps.view(images, bins**2, -1, 9).transpose(2, 3).flatten(1, 2))
        # torch.compile cannot see through a cache; it folds the constant itself.
        make = _spread if torch.compiler.is_compiling() else _kept_spread
        spread = make(self.BINS, height, width, top.dtype, top.device) @ torch.cat(products, dim=1)  # (B, h w, D)
        fused: Tensor = activation(
            norm(F.conv2d(top, of_top, padding=1) + spread.transpose(1, 2).view(images, -1, height, width))
        )
        return fused


def _averages(maps: Tensor, bins: int) -> Tensor:
    """(B, L, bins, bins): `adaptive_avg_pool2d`. An exported program has it for known sizes only, hence products."""
    if not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(maps, bins)
    shares = []
    for length in maps.shape[-2:]:
        edges, positions = torch.arange(bins + 1) * length, torch.arange(length)
        first, end = edges[:-1, None] // bins, (edges[1:, None] + bins - 1) // bins
        shares.append(((positions >= first) & (positions < end)).to(maps.dtype) / (end - first))
    rows, columns = shares
    return rows @ (maps @ columns.T)


def _spread(bins: tuple[int, ...], height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(h w, 9 sum(bins^2)): the weight of each cell, interpolated to (h, w), in each tap of a 3x3 convolution there."""
    taps = []
    for side in bins:
        cells = torch.eye(side**2, dtype=torch.promote_types(dtype, torch.float32), device=device)
        maps = F.interpolate(cells.view(-1, 1, side, side), size=(height, width), mode="bilinear", align_corners=False)
        taps.append(F.unfold(maps, 3, padding=1).flatten(0, 1).T)
    return torch.cat(taps, dim=1).to(dtype)


# Kept for later steps: what is made in inference mode could not take part in training.
_kept_spread = lru_cache(maxsize=8)(torch.inference_mode(mode=False)(_spread))


class FeaturePyramid(nn.Module):
    """Every level projected to one width, brought to the finest one's resolution, added, and smoothed."""

    def __init__(self, levels: Sequence[int], width: int, normed: Any) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), normed(width)) for channels in levels
        )
        self.fuse = _block(width, width, 3, normed)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        size = levels[0].shape[-2:]
        total = self.laterals[0](levels[0])
        for lateral, level in zip(list(self.laterals)[1:], levels[1:], strict=True):
            total = total + F.interpolate(lateral(level), size=size, mode="bilinear", align_corners=False)
        fused: Tensor = self.fuse(F.relu(total))
        return fused


class TokenPyramid(FeaturePyramid):
    """A feature pyramid of four levels of a ViT, which all lie on the grid of its patches.

    The first level is enlarged `factor` times by transposed convolutions, the second half as much, as in DPT (Ranftl et
    al. 2021) and the simple feature pyramid of ViTDet (Li et al. 2022): early blocks know most of edges.
    """

    def __init__(self, levels: Sequence[int], width: int, normed: Any, factor: int) -> None:
        super().__init__((width, width, *levels[2:]) if factor > 1 else levels, width, normed)
        factors = (factor, factor // 2) if factor > 1 else ()
        self.enlarge = nn.ModuleList(
            _enlarging(channels, width, times, normed) for channels, times in zip(levels, factors, strict=False)
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        enlarged = [module(level) for module, level in zip(self.enlarge, levels, strict=False)]
        return super().forward([*enlarged, *levels[len(enlarged) :]])


def _enlarging(channels: int, width: int, factor: int, normed: Any) -> nn.Sequential:
    """A projection to the width, then enlarged by 2 as often as needed."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 1, bias=False), normed(width), nn.GELU()]
    while factor > 1:
        layers += [nn.ConvTranspose2d(width, width, 2, stride=2, bias=False), normed(width), nn.GELU()]
        factor //= 2
    return nn.Sequential(*layers)


class Projection(nn.Module):
    """The backbone's last map, projected to the feature width."""

    def __init__(self, levels: Sequence[int], width: int, normed: Any) -> None:
        super().__init__()
        self.project = _block(levels[-1], width, 1, normed)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        projected: Tensor = self.project(levels[-1])
        return projected
