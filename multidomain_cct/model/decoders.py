"""Decoders: encoder features -> logits at the image's resolution.

A loss over pixels does not ask in which order they come, so a decoder also gives its logits in an order of its own (`pixels`), without the copies that make
a picture of them, and puts maps that go with them into that order (`in_order`). With a `Grid` it leaves out pixels.

Shapes: B images, C classes, D feature channels, h w feature size, s the encoder's stride, P pixels of the image that are in the grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multidomain_cct.model.pointwise import at_each_position
from multidomain_cct.model.upsampling import Interpolation, SubPixels, Upsampling

DECODERS = ("pixelshuffle", "bilinear")


@dataclass(frozen=True)
class Grid:
    """Every `step`-th pixel of every `step`-th row, from (row, column) on."""

    step: int = 1
    row: int = 0
    column: int = 0

    @classmethod
    def middle(cls, stride: int) -> Grid:
        """The pixel in the middle of each feature position."""
        return cls(stride, stride // 2, stride // 2)

    @classmethod
    def drawn(cls, step: int) -> Grid:
        """One of the step x step grids, at random; of step 1 there is only one, and nothing is drawn."""
        return cls(step, *torch.randint(step, (2,)).tolist()) if step > 1 else cls()


ALL_PIXELS = Grid()


class Decoder(nn.Module, ABC):
    """A decoder from (B, D, h, w) features to (B, C, s*h, s*w) logits: a 1x1 convolution to C channels, then upsampling."""

    classify: nn.Conv2d

    def pixels(self, features: Tensor, grid: Grid = ALL_PIXELS) -> Tensor:
        """(B, C, P): the logits of the grid's pixels, in the decoder's order."""
        (classify, *weights) = (weight[0] for weight in self.joined([self]))
        coarse = at_each_position(features.flatten(2), classify)
        return self.upsampling(coarse.view(*coarse.shape[:2], *features.shape[2:]), weights, grid).logits(slice(None))

    @abstractmethod
    def joined(self, decoders: Sequence[Decoder]) -> list[Tensor]:
        """Weights of K decoders like this one: (K, C', D), those of `classify` and perhaps rows of 0, that give the coarse logits; (K, ...), as `upsampling`
        takes them.
        """

    @abstractmethod
    def separated(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """(K, ...) parameters, in their order, whose weights are joined; or their gradients."""

    @abstractmethod
    def upsampling(self, coarse: Tensor, weights: Sequence[Tensor], grid: Grid = ALL_PIXELS) -> Upsampling:
        """From (B, C', h, w) coarse logits, which it may change, to the logits that `pixels` gives, a piece at a time."""

    @abstractmethod
    def in_order(self, maps: Tensor, grid: Grid = ALL_PIXELS) -> Tensor:
        """(B, ..., P): the grid's pixels of (B, ..., s*h, s*w) maps, in the decoder's order."""


def build_decoder(kind: str, channels: int, num_classes: int, stride: int) -> Decoder:
    """A decoder from (B, D, h, w) features to (B, C, s*h, s*w) logits.

    Raises ValueError, with the remedy, for a stride that the decoder cannot undo.
    """
    if kind == "bilinear":
        return BilinearDecoder(channels, num_classes, stride)
    if kind != "pixelshuffle":
        raise ValueError(f"decoder is {kind!r}; it is one of {', '.join(DECODERS)}.")
    if stride & (stride - 1):
        raise ValueError(
            f"decoder `pixelshuffle` doubles the resolution step by step, but the encoder's stride is {stride}, not a power of two. Use decoder=bilinear."
        )
    return PixelShuffleDecoder(channels, num_classes, stride)


class PixelShuffleDecoder(Decoder):
    """A 1x1 convolution to C channels, then one doubling by sub-pixel convolution per factor 2 of the stride (CCT section 4.1).

    The authors also put a ReLU behind the last doubling, which keeps logits from being negative and leaves classes stuck at IoU 0; here the last doubling
    ends with its convolution.

    All convolutions are 1x1, so a pixel's logits depend on the features of its own position alone, and pixels are shuffled only when a picture is wanted:
    the decoder's order is that of sub-pixels, those of the last doubling outermost, and of positions within them.
    """

    def __init__(self, channels: int, num_classes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.classify = nn.Conv2d(channels, num_classes, 1, bias=False)
        self.doublings = nn.ModuleList(_doubling(num_classes) for _ in range(stride.bit_length() - 1))

    def forward(self, features: Tensor) -> Tensor:
        (images, _, height, width), doublings = features.shape, len(self.doublings)
        shuffled = self.pixels(features).view(images, -1, *[2, 2] * doublings, height, width)
        # The digits of a pixel's row are the position's row, then the halves that the doublings choose, first doubling first.
        rows, columns = (range(2 * doublings + first, 1, -2) for first in (0, 1))
        picture = shuffled.permute(0, 1, 2 + 2 * doublings, *rows, 3 + 2 * doublings, *columns)
        return picture.reshape(images, -1, self.stride * height, self.stride * width)

    def joined(self, decoders: Sequence[Decoder]) -> list[Tensor]:
        classify, *own = (torch.stack(parameters) for parameters in zip(*(decoder.parameters() for decoder in decoders), strict=True))
        doublings = list(zip(own[::2], own[1::2], strict=True))
        # A further coarse logit, for what `SubPixels` puts there.
        return [
            F.pad(classify.flatten(2), (0, 0, 0, 1)),
            *(SubPixels.with_ones(*doubling, last=number == len(doublings)) for number, doubling in enumerate(doublings, 1)),
        ]

    def separated(self, joined: Sequence[Tensor]) -> list[Tensor]:
        return [joined[0][:, :-1, :, None, None], *(parameter for doubling in joined[1:] for parameter in SubPixels.without_ones(doubling))]

    def upsampling(self, coarse: Tensor, weights: Sequence[Tensor], grid: Grid = ALL_PIXELS) -> Upsampling:
        rows = []
        for number in range(len(self.doublings)):
            reach = self.stride >> (number + 1)  # pixels of the image that a sub-pixel of this doubling is wide
            rows.append(slice(2 * (grid.row // reach % 2) + grid.column // reach % 2, None, 4) if reach < grid.step else slice(None))
        return SubPixels(coarse.flatten(2), weights, rows)

    def in_order(self, maps: Tensor, grid: Grid = ALL_PIXELS) -> Tensor:
        kept = maps[..., grid.row :: grid.step, grid.column :: grid.step]
        side = self.stride // grid.step
        doublings = side.bit_length() - 1
        before, (height, width) = kept.shape[:-2], kept.shape[-2:]
        cells = kept.reshape(*before, height // side, *[2] * doublings, width // side, *[2] * doublings)
        first = len(before)
        row, column = first, first + 1 + doublings
        halves = [axis + doubling for doubling in range(doublings, 0, -1) for axis in (row, column)]
        return cells.permute(*range(first), *halves, row, column).reshape(*before, -1)


class BilinearDecoder(Decoder):
    """A 1x1 convolution to C channels, then bilinear upsampling to the image's resolution. Its order of pixels is that of the image."""

    def __init__(self, channels: int, num_classes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[2:]
        return self.pixels(features).view(len(features), -1, self.stride * height, self.stride * width)

    def joined(self, decoders: Sequence[Decoder]) -> list[Tensor]:
        weight, bias = (torch.stack(parameters) for parameters in zip(*(decoder.parameters() for decoder in decoders), strict=True))
        return [weight.flatten(2), bias]

    def separated(self, joined: Sequence[Tensor]) -> list[Tensor]:
        return [joined[0][..., None, None], joined[1]]

    def upsampling(self, coarse: Tensor, weights: Sequence[Tensor], grid: Grid = ALL_PIXELS) -> Upsampling:
        return Interpolation(coarse, weights[0], *_interpolations(coarse, self.stride, grid))

    def in_order(self, maps: Tensor, grid: Grid = ALL_PIXELS) -> Tensor:
        return maps[..., grid.row :: grid.step, grid.column :: grid.step].flatten(-2)


def _interpolations(maps: Tensor, factor: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """(h, factor*h) and (w, factor*w), or as many of their columns as the grid has rows and columns of pixels: as two matrix products, what `F.interpolate`
    gives in mode `bilinear` without aligned corners. On a CPU its backward pass, above all, is much faster.
    """
    rows, columns = (_interpolation(length, factor, maps) for length in maps.shape[-2:])
    return rows[:, grid.row :: grid.step], columns[:, grid.column :: grid.step]


def _interpolation(length: int, factor: int, like: Tensor) -> Tensor:
    """(length, factor*length): the weights of each position in each interpolated one."""
    identity = torch.eye(length, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return F.interpolate(identity[None], scale_factor=float(factor), mode="linear")[0].to(like.dtype)


def _doubling(num_classes: int) -> nn.Conv2d:
    """From the logits of a position to those of its four sub-pixels, which start equal."""
    doubling = nn.Conv2d(num_classes, 4 * num_classes, 1)
    icnr_(doubling.weight)
    # Random biases would differ between the sub-pixels.
    nn.init.zeros_(doubling.get_parameter("bias"))
    return doubling


def icnr_(weight: Tensor) -> None:
    """Fill a (4C, D, 1, 1) weight in place so that the four sub-pixels of a position start equal (Aitken et al. 2017): no checkerboard at initialisation."""
    with torch.no_grad():
        kernel = nn.init.kaiming_normal_(torch.empty_like(weight[::4]))
        weight.copy_(kernel.repeat_interleave(4, dim=0))
