"""Local variation of a map, class borders on its grid, and how well the one finds the other.

Shapes: C classes of the domain, D channels, H W image size, H' W' size of the labels, h w grid of whole patches, s
stride, n positions.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.data.domain import IGNORE


def local_variation(features: Tensor) -> Tensor:
    """(h, w) float32 mean Euclidean distance of each position of (D, h, w) features to its neighbours, 3 to 8 of them.

    A grid of one position gives 0.
    """
    height, width = features.shape[-2:]
    around = F.pad(features.float(), (1, 1, 1, 1))
    inside = F.pad(around.new_ones(height, width), (1, 1, 1, 1))
    total, count = around.new_zeros(height, width), around.new_zeros(height, width)
    for down, right in product(range(3), repeat=2):
        shifted = (..., slice(down, down + height), slice(right, right + width))
        total += torch.linalg.vector_norm(around[shifted] - features, dim=0) * inside[shifted]
        count += inside[shifted]
    # The position itself adds 0 to the sum.
    return total / (count - 1).clamp(min=1)


def image_patches(image: Tensor, stride: int) -> Tensor:
    """(3 s s, h, w) float32: the pixels, 0 to 1, of each whole s x s patch of a (3, H, W) uint8 image."""
    height, width = (side // stride for side in image.shape[-2:])
    whole = image[:, : height * stride, : width * stride].float() / 255
    blocks = whole.reshape(3, height, stride, width, stride).permute(0, 2, 4, 1, 3)
    return blocks.reshape(3 * stride * stride, height, width)


def class_borders(ids: Tensor, size: tuple[int, int], *, stride: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Two (h, w) bool maps over the whole s x s patches of an image of `size` = (H, W), from (H', W') uint8 train ids:
    border, and counted.

    A position is a border when its patch and the patches of its 8 neighbours together hold more than one class. It is
    counted when its patch holds a class; ignored pixels hold none. A label pixel belongs to the patch under its centre,
    so labels of any resolution keep all their classes.
    """
    if ids.shape[0] < size[0] or ids.shape[1] < size[1]:
        ids = F.interpolate(ids[None, None], size=size, mode="nearest-exact")[0, 0]
    height, width = size[0] // stride, size[1] // stride
    rows, columns = (
        ((torch.arange(length, device=ids.device) + 0.5) * side / length).long() // stride
        for length, side in zip(ids.shape, size, strict=True)
    )
    inside = (rows < height)[:, None] & (columns < width) & (ids != IGNORE)
    cells = (rows[:, None] * width + columns)[inside]
    present = torch.zeros(num_classes, height * width, device=ids.device)
    present[ids[inside].long(), cells] = 1
    present = present.view(num_classes, height, width)
    around = F.max_pool2d(present, 3, stride=1, padding=1) if cells.numel() else present
    return around.sum(dim=0) > 1, present.any(dim=0)


def area_under_curve(values: Tensor, border: Tensor) -> float | None:
    """Area under the ROC curve of (n,) values as a detector of (n,) bool borders, ties counted half; None when all
    positions are of one kind.
    """
    levels, ranks = torch.unique(values, return_inverse=True)
    at_border, inside = (torch.bincount(ranks[kind], minlength=len(levels)).double() for kind in (border, ~border))
    pairs = float(at_border.sum() * inside.sum())
    lower = inside.cumsum(0) - inside
    return float((at_border * (lower + inside / 2)).sum()) / pairs if pairs else None
