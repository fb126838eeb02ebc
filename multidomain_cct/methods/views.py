"""Strong views of unlabelled images: colour and sharpness change, every pixel stays in place; and patches of one image
in another.

Shapes: U unlabelled images, H W image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

_STRONG = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))], p=0.5),
    ]
)
"""As in UniMatch (Yang et al., CVPR 2023), with SimCLR's blur."""


def strong_view(images: Tensor) -> Tensor:
    """(U, 3, H, W) uint8 images, each changed at random (torch's global generator)."""
    return torch.stack([_STRONG(image) for image in images]) if len(images) else images


def draw_strong_view(images: Tensor, cutmix: float) -> tuple[Tensor, CutMix]:
    """A strong view of (U, 3, H, W) uint8 images, mixed with this probability, and the mix, which targets need too."""
    mix = draw_cutmix(images, probability=cutmix)
    return mix(strong_view(images)), mix


@dataclass(frozen=True)
class CutMix:
    """In each image, a rectangle of the batch's next image (Yun et al. 2019; French et al. 2020)."""

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
) -> CutMix:
    """A rectangle in each of (U, 3, H, W) images, with this probability and share of the area, as in UniMatch."""
    count, _, height, width = images.shape
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
    return CutMix(in_rows[:, :, None] & in_columns[:, None, :] & chosen[:, None, None])
