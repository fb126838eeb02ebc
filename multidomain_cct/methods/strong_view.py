"""Strong views: colour and sharpness of each image change at random, every pixel stays in place.

What is drawn, and in which order, is what torchvision's transforms draw for one image after the other. The images are
then changed together, with one kernel for each operation. Parameters are drawn on the CPU and copied without waiting:
the host never reads from a GPU.

Shapes: U images, n of them, H W image size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

JITTER = v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25)
"""As in UniMatch (Yang et al., CVPR 2023), as are the probabilities below."""
JITTERED, GREY, BLURRED = 0.8, 0.2, 0.5
_BLUR = 2.0 / 512
"""Largest standard deviation of the blur as a share of the crop's shorter side: UniMatch's 2 pixels belong to crops of
321 to 801 pixels, and a small crop would lose its objects.
"""
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
"""ColorJitter's numbers of its operations."""


def blur_of(size: Sequence[int]) -> v2.GaussianBlur:
    """The blur of images of (H, W)."""
    sigma = max(0.11, _BLUR * min(size))
    return v2.GaussianBlur(kernel_size=2 * math.ceil(2 * sigma) + 1, sigma=(0.1, sigma))


@dataclass(frozen=True)
class _Change:
    """What is drawn for one image."""

    before: tuple[tuple[int, float], ...]
    """Operations and their factors, in order, before the hue is turned."""
    hue: float | None
    """In turns, -0.5 to 0.5; None leaves it."""
    after: tuple[tuple[int, float], ...]
    """Operations after it."""
    sigma: float | None
    """Standard deviation of the blur in pixels; None leaves it out."""

    @classmethod
    def draw(cls, blur: v2.GaussianBlur) -> _Change:
        blends: list[tuple[int, float]] = []
        hue, place = None, 0
        if torch.rand(1) < JITTERED:
            drawn = JITTER.make_params([])
            order = drawn["fn_idx"].tolist()
            factors = [drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation")]
            blends = [(operation, factors[operation]) for operation in order if operation != _HUE]
            hue, place = drawn["hue_factor"], order.index(_HUE)
        if torch.rand(1) < GREY:
            blends.append((_SATURATION, 0.0))
        sigma = blur.make_params([])["sigma"][0] if torch.rand(1) < BLURRED else None
        return cls(tuple(blends[:place]), hue, tuple(blends[place:]), sigma)


def strong_view(images: Tensor) -> Tensor:
    """(U, 3, H, W) uint8 images, each changed at random (torch's global generator of the CPU)."""
    if not len(images):
        return images
    blur = blur_of(images.shape[-2:])
    changes = [_Change.draw(blur) for _ in images]
    # Whole numbers 0 to 255 between the operations, as torchvision's are.
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    pixels = _blended(pixels, [change.before for change in changes])
    pixels = _changed(pixels, [change.hue for change in changes], _turned)
    pixels = _blended(pixels, [change.after for change in changes])
    kernels = [None if change.sigma is None else _kernel(blur.kernel_size[0], change.sigma) for change in changes]
    return _changed(pixels, kernels, _blurred).to(torch.uint8)


def _changed(pixels: Tensor, values: Sequence[object], change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The images with those changed whose value is not None; `change` takes them and their (n, ...) values."""
    rows = [row for row, value in enumerate(values) if value is not None]
    if not rows:
        return pixels
    table = torch.tensor([values[row] for row in rows], dtype=torch.float32).to(pixels.device, non_blocking=True)
    if len(rows) == len(values):
        return change(pixels, table)
    chosen = torch.tensor(rows).to(pixels.device, non_blocking=True)
    return pixels.index_copy(0, chosen, change(pixels[chosen], table))


def _blended(pixels: Tensor, operations: Sequence[Sequence[tuple[int, float]]]) -> Tensor:
    """The images after each one's operations, in its own order: the first ones of all images, then the second ones."""
    for turn in range(max(map(len, operations))):
        coefficients = [_coefficients(*each[turn]) if turn < len(each) else None for each in operations]
        pixels = _changed(pixels, coefficients, _blend)
    return pixels


def _coefficients(operation: int, factor: float) -> tuple[float, float, float]:
    """Factors on an image, on its grey version and on the mean of that: brightness, contrast and saturation differ only
    in what the image is blended with, which is black, the mean or the grey version.
    """
    return factor, (1 - factor) * (operation == _SATURATION), (1 - factor) * (operation == _CONTRAST)


def _blend(pixels: Tensor, coefficients: Tensor) -> Tensor:
    own, greys, means = (column.view(-1, 1, 1, 1) for column in coefficients.unbind(dim=1))
    red, green, blue = pixels.chunk(3, dim=1)
    grey = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()  # (n, 1, H, W)
    other = (grey.mean(dim=(2, 3), keepdim=True) * means).addcmul(grey, greys)
    return torch.addcmul(other, pixels, own).clamp_(0, 255).floor_()


def _turned(pixels: Tensor, turns: Tensor) -> Tensor:
    """The images with the hues of all pixels turned (HSV, without leaving RGB)."""
    red, green, blue = pixels.chunk(3, dim=1)
    low, high = pixels.aminmax(dim=1, keepdim=True)
    chroma = high - low
    scale = 1 / chroma.clamp(min=1)
    sector = torch.where(high == green, 2 + (blue - red) * scale, 4 + (red - green) * scale)
    sector = torch.where(high == red, (green - blue) * scale, sector) + 6 * turns.view(-1, 1, 1, 1)
    # Of red, green and blue: how many sixths of a turn each is away from where it is smallest.
    away = (sector + torch.arange(5, 0, -2, device=pixels.device).view(1, 3, 1, 1)).remainder_(6)
    turned = high - chroma * torch.minimum(away, 4 - away).clamp_(0, 1)
    return turned.mul_(255.999 / 255).floor_()


def _kernel(size: int, sigma: float) -> list[float]:
    """torchvision's Gaussian weights, which sum to 1."""
    limit = (size - 1) / (2 * math.sqrt(2))
    weights: list[float] = (torch.linspace(-limit, limit, size) / sigma).square().neg().softmax(dim=0).tolist()
    return weights


def _blurred(pixels: Tensor, kernels: Tensor) -> Tensor:
    """The images blurred with (n, k) weights, down and across."""
    radius = kernels.shape[1] // 2
    weights = kernels.view(len(kernels), 1, 1, 1, -1).unbind(dim=-1)
    height, width = pixels.shape[-2:]
    # Sums of shifted images, not a convolution, which autocast would round to 16 bits.
    padded = F.pad(pixels, [0, 0, radius, radius], mode="reflect")
    down = _sum_of_products([padded[:, :, shift : shift + height] for shift in range(len(weights))], weights)
    padded = F.pad(down, [radius, radius, 0, 0], mode="reflect")
    return _sum_of_products([padded[..., shift : shift + width] for shift in range(len(weights))], weights).round_()


def _sum_of_products(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(part, weight)
    return total
