"""Local variation of a map, class borders on its grid, and how well the one finds the other.

Shapes: C classes of the domain, D channels, H W image size, H' W' size of the labels, h w grid of whole patches, s
stride, n positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.data.domain import IGNORE

_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Half of the 8: each pair of positions is measured once."""
_BINS, _BITS = 1 << 19, 12
"""A float32 that is not negative, less its last 12 bits, is one of 2**19 numbers in the same order, each within 0.05 %
of the float.
"""


def local_variation(features: Tensor) -> Tensor:
    """(h, w) float32 mean Euclidean distance of each position of (D, h, w) features to its neighbours, 3 to 8 of them.

    A grid of one position gives 0.
    """
    features = features.float()
    height, width = features.shape[-2:]
    total, count = features.new_zeros(height, width), features.new_zeros(height, width)
    for down, right in _NEIGHBOURS:
        upper, lower = slice(0, height - down), slice(down, height)
        left, shifted = slice(max(0, -right), width - max(0, right)), slice(max(0, right), width - max(0, -right))
        distance = torch.linalg.vector_norm(features[:, upper, left] - features[:, lower, shifted], dim=0)
        for rows, columns in ((upper, left), (lower, shifted)):
            total[rows, columns] += distance
            count[rows, columns] += 1
    return total / count.clamp(min=1)


def image_patches(image: Tensor, stride: int) -> Tensor:
    """(3 s s, h, w) float32: the pixels, 0 to 1, of each whole s x s patch of a (3, H, W) uint8 image."""
    height, width = (side // stride for side in image.shape[-2:])
    whole = image[:, : height * stride, : width * stride].float() / 255
    return (
        whole.reshape(3, height, stride, width, stride)
        .permute(0, 2, 4, 1, 3)
        .reshape(3 * stride * stride, height, width)
    )


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
    if not height * width:
        empty = torch.zeros(height, width, dtype=torch.bool, device=ids.device)
        return empty, empty
    rows, columns = (
        ((torch.arange(length, device=ids.device) + 0.5) * side / length).long() // stride
        for length, side in zip(ids.shape, size, strict=True)
    )
    inside = (rows < height)[:, None] & (columns < width) & (ids != IGNORE)
    cells = (rows[:, None] * width + columns)[inside]
    present = torch.zeros(num_classes, height * width, device=ids.device)
    present[ids[inside].long(), cells] = 1
    present = present.view(num_classes, height, width)
    around = F.max_pool2d(present[None], 3, stride=1, padding=1)[0]
    return around.sum(dim=0) > 1, present.any(dim=0)


def area_under_curve(values: Tensor, border: Tensor) -> float | None:
    """Area under the ROC curve of (n,) values as a detector of (n,) bool borders, ties counted half; None when all
    positions are of one kind.
    """
    levels, ranks = torch.unique(values, return_inverse=True)
    at_border, inside = (torch.bincount(ranks[kind], minlength=len(levels)) for kind in (border, ~border))
    return _area_of_counts(at_border, inside)


def _area_of_counts(at_border: Tensor, inside: Tensor) -> float | None:
    """The same, from the number of positions of each kind at each value, in order of the values."""
    pairs = float(at_border.sum()) * float(inside.sum())
    if not pairs:
        return None
    lower = inside.cumsum(0) - inside
    return float((at_border.double() * (lower.double() + 0.5 * inside.double())).sum()) / pairs


class Tally:
    """One map over all images: the AUC of each, and histograms of the variation inside classes and at borders."""

    def __init__(self, device: torch.device) -> None:
        self.areas: list[float] = []
        self.counts = torch.zeros(2, _BINS, dtype=torch.int64, device=device)

    def add(self, values: Tensor, border: Tensor, area: float | None) -> None:
        keys = values.contiguous().view(torch.int32) >> _BITS
        for kind in (0, 1):
            self.counts[kind] += torch.bincount(keys[border == bool(kind)], minlength=_BINS)
        if area is not None:
            self.areas.append(area)

    @property
    def pooled(self) -> float | None:
        return _area_of_counts(self.counts[1], self.counts[0])

    @property
    def border_share(self) -> float:
        inside, at_border = self.counts.sum(dim=1).tolist()
        return float(at_border / max(1, inside + at_border))
