"""Parts of one image in another: CutMix, ClassMix and pasted classes.

Shapes: U images, C classes of the domain, H W image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multidomain_cct.methods.strong_view import strong_view


def draw_strong_view(images: Tensor, cutmix: float) -> tuple[Tensor, Mix]:
    """A strong view of (U, 3, H, W) uint8 images, mixed with this probability, and the mix, which targets need too."""
    mix = draw_cutmix(images, probability=cutmix)
    return mix(strong_view(images)), mix


@dataclass(frozen=True)
class Mix:
    """In each image, some pixels of the batch's next image."""

    inside: Tensor
    """(U, H, W) bool: pixels that come from the next image."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Mix (U, H, W) or (U, C, H, W) values of the images."""
        inside = self.inside if pixels.ndim == 3 else self.inside.unsqueeze(1)
        return torch.where(inside, pixels.roll(1, dims=0), pixels)


def draw_cutmix(
    images: Tensor,
    *,
    probability: float = 0.5,
    area: Sequence[float] = (0.02, 0.4),
    aspect: Sequence[float] = (0.3, 1 / 0.3),
) -> Mix:
    """A rectangle in each of (U, ..., H, W) images (CutMix, Yun et al. 2019), with this probability, share of the area
    and ratio of width to height; the defaults are UniMatch's.
    """
    count, height, width = len(images), *images.shape[-2:]
    device = images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, device=device).uniform_(low, high)

    size, ratio = uniform(*area) * height * width, uniform(*aspect)
    tall = (size / ratio).sqrt().clamp(max=height)
    wide = (size * ratio).sqrt().clamp(max=width)
    top, left = torch.rand(count, device=device) * (height - tall), torch.rand(count, device=device) * (width - wide)
    rows, columns = torch.arange(height, device=device)[None], torch.arange(width, device=device)[None]
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    chosen = torch.rand(count, device=device) < probability
    return Mix(in_rows[:, :, None] & in_columns[:, None, :] & chosen[:, None, None])


def draw_half_boxes(images: Tensor, probability: float) -> Mix:
    """CutMix with a box of half the area (French et al., BMVC 2020)."""
    return draw_cutmix(images, probability=probability, area=(0.5, 0.5), aspect=(0.5, 2.0))


def draw_classmix(ids: Tensor, probability: float, num_classes: int) -> Mix:
    """The pixels of half of the classes that (U, H, W) ids show, rounded up (ClassMix, Olsson et al., WACV 2021)."""
    shown = torch.stack([(ids == label).flatten(1).any(dim=1) for label in range(num_classes)], dim=1)  # (U, C)
    # The rank of each class in a random order of the classes that are shown.
    order = torch.rand(shown.shape, device=ids.device).masked_fill(~shown, 2.0).argsort(dim=1).argsort(dim=1)
    chosen = shown & (2 * order < shown.sum(dim=1, keepdim=True))
    chosen &= torch.rand(len(ids), 1, device=ids.device) < probability
    taken = chosen.gather(1, ids.flatten(1)).view_as(ids)
    return Mix(taken.roll(1, dims=0))


@dataclass(frozen=True)
class Pasted:
    """In each of U images, the pixels of one class of a labelled image."""

    inside: Tensor
    """(U, H, W) bool: the pixels that are replaced."""
    donors: Tensor
    """(U,) numbers of the labelled images that they come from."""
    classes: Tensor
    """(U,) their classes."""


def draw_rare_class(masks: Tensor, count: int, shares: Tensor, probability: float) -> Pasted:
    """For each of `count` images a labelled image, one of its classes, and where (B, H, W) `masks` show it.

    A class is drawn with the inverse of its share of the labelled pixels, (C,) `shares`.
    """
    device = masks.device
    donors = torch.randint(len(masks), (count,), device=device)
    masks = masks[donors]  # (U, H, W)
    shown = torch.stack([(masks == label).flatten(1).any(dim=1) for label in range(len(shares))], dim=1)  # (U, C)
    odds = shown / shares.to(device, non_blocking=True).clamp(min=1e-4)
    # An image without any class has nothing to give: whatever is drawn shows no pixel.
    classes = torch.multinomial(odds + 1e-9, 1).squeeze(1)
    chosen = torch.rand(count, device=device) < probability
    return Pasted((masks == classes[:, None, None]) & chosen[:, None, None], donors, classes)
