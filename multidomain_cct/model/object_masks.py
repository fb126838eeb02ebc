"""Where the main decoder sees objects: computed once per step, shared by all perturbations.

Shapes: B images, C classes, h w feature size, N object regions of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Regions:
    """Connected object regions of a batch, at feature resolution, all int64."""

    image: Tensor
    """(N,)."""
    area: Tensor
    """(N,) feature positions."""
    start: Tensor
    """(2, N): the first row and the first column."""
    end: Tensor
    """(2, N): the last row and the last column, plus 1."""


@dataclass(frozen=True)
class ObjectMasks:
    """Where a batch shows objects, at feature resolution."""

    masks: Tensor
    """(B, 1, h, w) bool: the main decoder predicts a `thing` there."""

    @cached_property
    def regions(self) -> Regions:
        """The connected regions of the masks, computed on first use."""
        return regions_of(self.masks[:, 0])


def objects_of(middles: Tensor, valid: Tensor, things: Sequence[bool], stride: int) -> Tensor:
    """(B, 1, h, w) bool: where the predicted class is a thing.

    `middles` are (B, C, h, w) logits of the pixel in the middle of each position; a position whose middle is not valid
    in (B, H, W) `valid` holds no object.
    """
    table = torch.tensor(things).to(middles.device, non_blocking=True)
    masks = table[middles.argmax(dim=1)] & valid[:, stride // 2 :: stride, stride // 2 :: stride]
    return masks.unsqueeze(1)


def components(mask: Tensor) -> Tensor:
    """(B, h, w) int64 region numbers of a (B, h, w) bool mask, 0 where it is False.

    Positions are connected through edges and corners. The largest position number spreads over its region; few steps
    suffice because each also follows the numbers as pointers.
    """
    count = mask.shape[1] * mask.shape[2]
    # In floats, which max pooling wants; 32 bits hold positions up to 2^24 exactly.
    assert count < 2**24, "the feature map has more positions than 32-bit floats can number"
    inside = mask.float()
    labels = inside * torch.arange(1, count + 1, device=mask.device, dtype=torch.float32).view(1, *mask.shape[1:])
    while True:
        spread = labels
        for _ in range(2):
            spread = F.max_pool2d(spread.unsqueeze(1), 3, stride=1, padding=1).squeeze(1) * inside
        pointers = F.pad(spread.flatten(1), (1, 0))
        spread = pointers.gather(1, spread.flatten(1).long()).view_as(labels)
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def regions_of(mask: Tensor) -> Regions:
    """The connected regions of a (B, h, w) bool mask, through edges or corners, with their bounding boxes."""
    labels = components(mask)
    positions = mask.nonzero().T  # (3, P): image, row, column
    codes = labels[tuple(positions)] + positions[0] * (labels[0].numel() + 1)
    _, member, area = torch.unique(codes, return_inverse=True, return_counts=True)

    def over_region(reduce: str) -> Tensor:
        """(3, N): the smallest or largest image, row and column of each region."""
        zeros = positions.new_zeros(3, len(area))
        return zeros.scatter_reduce(1, member.expand(3, -1), positions, reduce, include_self=False)

    first, last = over_region("amin"), over_region("amax")
    return Regions(first[0], area, first[1:], last[1:] + 1)
