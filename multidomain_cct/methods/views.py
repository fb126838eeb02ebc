"""Strong views of unlabelled images: changes of colour and sharpness that leave every pixel in its place, and patches
of one image in another.

Shapes: U unlabelled images, H W image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from multidomain_cct.model.losses import at_least_float32

_STRONG = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))], p=0.5),
    ]
)
"""The colours of UniMatch (Yang et al., CVPR 2023), whose blur is that of SimCLR."""


def strong_view(images: Tensor) -> Tensor:
    """(U, 3, H, W) uint8 images, each changed in its own way; randomness is torch's global one."""
    if not len(images):
        return images
    return torch.stack([_STRONG(image) for image in images])


@dataclass(frozen=True)
class CutMix:
    """For each image a rectangle that is taken from the next image of the batch (Yun et al.

    2019; French et al. 2020).
    """

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
    """A rectangle for each of (U, 3, H, W) images with this probability, of this share of the image's area, as in
    UniMatch.
    """
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


def pseudo_labels(target: Tensor) -> tuple[Tensor, Tensor]:
    """Train ids and their probability, both (U, H, W), of (U, C, H, W) class probabilities."""
    confidence, ids = at_least_float32(target).max(dim=1)
    return ids, confidence
