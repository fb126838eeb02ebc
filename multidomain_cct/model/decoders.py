"""Decoders: encoder features -> logits at the image's resolution.

Many decoders of one kind are applied together: their weights are stacked, and each convolution is one batched matrix
product. Per-pixel losses do not depend on the order of the pixels, so a group gives logits in the order in which its
last step computes them, `pixels` arranges maps that go with them in the same order, and no picture is put together.
A `Grid` leaves out pixels.

Shapes: G decoders of a group, B images, C classes, D feature channels, h w feature size, s the encoder's stride,
U V the two axes of the pixels in the decoder's order, v a part of V.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multidomain_cct.errors import UserError, require_choice

DECODERS = ("pixelshuffle", "bilinear")
LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}
"""What a group of decoders may hold. More would leave a CPU's caches; on a GPU (not measured) it bounds the memory."""


def budget_of(device: torch.device) -> int:
    """Logits that may exist at once on the device."""
    return LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE["cuda"])


@dataclass(frozen=True)
class Grid:
    """Every `step`-th pixel and row, starting at (row, column)."""

    step: int = 1
    row: int = 0
    column: int = 0

    @classmethod
    def middle(cls, stride: int) -> Grid:
        """The pixel in the middle of each feature position."""
        return cls(stride, stride // 2, stride // 2)

    @classmethod
    def drawn(cls, step: int) -> Grid:
        """One of the step x step grids, at random. With step 1 there is only one, and nothing is drawn."""
        return cls(step, *torch.randint(step, (2,)).tolist()) if step > 1 else cls()

    def of(self, maps: Tensor) -> Tensor:
        """The grid's pixels of (..., H, W) maps."""
        return maps[..., self.row :: self.step, self.column :: self.step]


ALL_PIXELS = Grid()


class Decoder(nn.Module, ABC):
    """(B, D, h, w) features -> (B, C, s*h, s*w) logits: a 1x1 convolution to C channels, then upsampling."""

    stride: int
    classify: nn.Conv2d

    def forward(self, features: Tensor) -> Tensor:
        group = DecoderGroup.of([self])
        return self.picture(group.logits(group.coarse(features[None]))[0], features.shape[2:])

    @abstractmethod
    def upsample(self, coarse: Tensor, weights: Sequence[Tensor], grid: Grid, part: slice) -> Tensor:
        """(G, B, C, U, v): logits of the grid's pixels in a part of the axis V, for (G, B, C, h, w) coarse logits.

        `weights` are stacked, (G, ...) for each parameter but those of `classify`.
        """

    @abstractmethod
    def length(self, size: Sequence[int], grid: Grid) -> int:
        """Of the axis V, for (h, w) features."""

    @abstractmethod
    def pixels(self, maps: Tensor, grid: Grid = ALL_PIXELS) -> Tensor:
        """(B, ..., U, V): the grid's pixels of (B, ..., s*h, s*w) maps, in the decoder's order."""

    @abstractmethod
    def picture(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """(B, C, s*h, s*w) of the logits of all pixels, given (h, w). The inverse of `pixels`."""


@dataclass(frozen=True)
class DecoderGroup:
    """Decoders of one class, applied together."""

    kind: Decoder
    """Any of them; its own weights are not used."""
    classify: tuple[Tensor, ...]
    """(G, ...) weights, and biases if there are any, of the 1x1 convolutions to C channels."""
    upsampling: tuple[Tensor, ...]
    """(G, ...) for each other parameter."""
    grid: Grid = ALL_PIXELS

    @classmethod
    def of(cls, decoders: Sequence[Decoder], grid: Grid = ALL_PIXELS) -> DecoderGroup:
        """Autograd follows the stacked weights back to each decoder's parameters."""
        each = zip(*(decoder.parameters() for decoder in decoders), strict=True)
        # A single decoder's weights are views.
        weights = [torch.stack(same) if len(same) > 1 else same[0][None] for same in each]
        number = len(list(decoders[0].classify.parameters()))
        return cls(decoders[0], tuple(weights[:number]), tuple(weights[number:]), grid)

    def __len__(self) -> int:
        return len(self.classify[0])

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.classify + self.upsampling

    def __getitem__(self, index: slice | Tensor) -> DecoderGroup:
        """Some of the decoders."""
        classify, upsampling = (tuple(weight[index] for weight in own) for own in (self.classify, self.upsampling))
        return replace(self, classify=classify, upsampling=upsampling)

    @property
    def num_classes(self) -> int:
        return self.kind.classify.out_channels

    def num_pixels(self, size: Sequence[int]) -> int:
        """Pixels of the grid in an image with (h, w) features."""
        return size[0] * size[1] * (self.kind.stride // self.grid.step) ** 2

    def coarse(self, features: Tensor) -> Tensor:
        """(G, B, C, h, w) logits of each position, for (G, B, D, h, w) features, or (1, B, D, h, w) that all share."""
        return _at_each_position(features, *self.classify)

    def logits(self, coarse: Tensor, part: slice = slice(None)) -> Tensor:
        """(G, B, C, U, v) logits of the grid's pixels, all or a part of the axis V."""
        return self.kind.upsample(coarse, self.upsampling, self.grid, part)

    def pieces(self, coarse: Tensor) -> Iterator[tuple[slice, slice]]:
        """Images and a part of the axis V, which together are all pixels and have as many logits as the budget allows.

        Whole images where one fits, otherwise parts of one.
        """
        size, maps = coarse.shape[3:], coarse.shape[0] * coarse.shape[2]
        budget, logits = budget_of(coarse.device), maps * self.num_pixels(size)
        length = self.kind.length(size, self.grid)
        images, pixels = max(1, budget // logits), max(1, min(length, length * budget // logits))
        for image in range(0, coarse.shape[1], images):
            for start in range(0, length, pixels):
                yield slice(image, image + images), slice(start, start + pixels)


def build_decoder(kind: str, channels: int, num_classes: int, stride: int) -> Decoder:
    """A decoder of (B, D, h, w) features. Raises UserError for a stride that it cannot undo."""
    require_choice("decoder", kind, DECODERS)
    if kind == "bilinear":
        return BilinearDecoder(channels, num_classes, stride)
    if stride & (stride - 1):
        raise UserError(f"encoder.stride is {stride}; decoder `pixelshuffle` takes powers of 2. Use decoder=bilinear.")
    return PixelShuffleDecoder(channels, num_classes, stride)


class PixelShuffleDecoder(Decoder):
    """A 1x1 convolution to C channels, then one sub-pixel convolution per factor 2 of the stride (CCT section 4.1).

    The authors also put a ReLU after the last doubling, which keeps logits from being negative and leaves classes
    stuck at IoU 0; here the last doubling ends with its convolution.

    All convolutions are 1x1: a pixel's logits depend on the features of its own position only. So the decoder's order
    is U sub-pixels (those of the last doubling outermost) by V positions.
    """

    def __init__(self, channels: int, num_classes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.classify = nn.Conv2d(channels, num_classes, 1, bias=False)
        self.doublings = nn.ModuleList(_doubling(num_classes) for _ in range(stride.bit_length() - 1))

    def upsample(self, coarse: Tensor, weights: Sequence[Tensor], grid: Grid, part: slice) -> Tensor:
        maps = coarse.flatten(3)[..., part]  # (G, B, C, v)
        before, positions = maps.shape[:3], maps.shape[-1]
        doublings = list(zip(weights[::2], weights[1::2], strict=True))
        for number, (weight, bias) in enumerate(doublings, start=1):
            reach = self.stride >> number  # width of this doubling's sub-pixels in pixels of the image
            if reach < grid.step:
                # Only one of the four sub-pixels is in the grid.
                wanted = slice(2 * (grid.row // reach % 2) + grid.column // reach % 2, None, 4)
                weight, bias = weight[:, wanted], bias[:, wanted]
            maps = _at_each_position(maps, weight, bias, relu=number < len(doublings)).view(*before, -1)
        return maps.view(*before, -1, positions)

    def length(self, size: Sequence[int], grid: Grid) -> int:
        return size[0] * size[1]

    def pixels(self, maps: Tensor, grid: Grid = ALL_PIXELS) -> Tensor:
        kept = grid.of(maps)
        side = self.stride // grid.step
        doublings = side.bit_length() - 1
        before, (height, width) = kept.shape[:-2], kept.shape[-2:]
        cells = kept.reshape(*before, height // side, *[2] * doublings, width // side, *[2] * doublings)
        first = len(before)
        row, column = first, first + 1 + doublings
        halves = [axis + doubling for doubling in range(doublings, 0, -1) for axis in (row, column)]
        return cells.permute(*range(first), *halves, row, column).reshape(*before, side * side, -1)

    def picture(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        (images, num_classes, *_), (height, width), doublings = logits.shape, size, len(self.doublings)
        shuffled = logits.reshape(images, num_classes, *[2, 2] * doublings, height, width)
        # A pixel's row is its position's row, then the halves that the doublings choose, the first doubling first.
        rows, columns = (range(2 * doublings + first, 1, -2) for first in (0, 1))
        picture = shuffled.permute(0, 1, 2 + 2 * doublings, *rows, 3 + 2 * doublings, *columns)
        return picture.reshape(images, num_classes, self.stride * height, self.stride * width)


class BilinearDecoder(Decoder):
    """A 1x1 convolution to C channels, then bilinear upsampling. Its order of pixels is that of the image."""

    def __init__(self, channels: int, num_classes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def upsample(self, coarse: Tensor, weights: Sequence[Tensor], grid: Grid, part: slice) -> Tensor:
        with torch.autocast(coarse.device.type, enabled=False):
            # An exported program has sizes that are not numbers yet, and no cache.
            make = _interpolation if torch.compiler.is_exporting() else _kept_interpolation
            rows, columns = (make(length, self.stride, coarse.dtype, coarse.device) for length in coarse.shape[-2:])
            rows, columns = rows[:, grid.row :: grid.step], columns[:, grid.column :: grid.step][:, part]
            return rows.T @ (coarse @ columns)

    def length(self, size: Sequence[int], grid: Grid) -> int:
        return size[1] * self.stride // grid.step

    def pixels(self, maps: Tensor, grid: Grid = ALL_PIXELS) -> Tensor:
        return grid.of(maps)

    def picture(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        return logits


def _at_each_position(maps: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """1x1 convolutions of (1 or G, B, C, ...) maps with (G, C', C, 1, 1) weights and (G, C') biases.

    One matrix product per decoder and image is several times faster on a CPU than torch's convolution where a matrix
    has few rows or columns, and on a GPU a whole group is one launch.
    """
    images = maps.shape[1]
    flat = maps.expand(len(weight), *maps.shape[1:]).flatten(0, 1).flatten(2)  # (G B, C, n)
    weights = weight.flatten(2)[:, None].expand(-1, images, -1, -1).flatten(0, 1)  # (G B, C', C)
    if bias is None:
        products = torch.bmm(weights, flat)
    else:
        biases = bias[:, None, :, None].expand(-1, images, -1, -1).flatten(0, 1)  # (G B, C', 1)
        products = torch.baddbmm(biases, weights, flat)
    if relu:
        # Before the view: in place behind it, autograd would copy everything twice.
        products = products.relu_()
    return products.view(len(weight), images, -1, *maps.shape[3:])


def _interpolation(length: int, factor: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length, factor*length): the weight of each position in each interpolated one.

    Products with two of them are `F.interpolate` in mode `bilinear`, whose backward pass is much slower on a CPU.
    """
    identity = torch.eye(length, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return F.interpolate(identity[None], scale_factor=float(factor), mode="linear")[0].to(dtype)


# Kept for later steps: what is made in inference mode could not take part in training.
_kept_interpolation = lru_cache(maxsize=64)(torch.inference_mode(mode=False)(_interpolation))


def _doubling(num_classes: int) -> nn.Conv2d:
    """From the logits of a position to those of its four sub-pixels, which start equal."""
    doubling = nn.Conv2d(num_classes, 4 * num_classes, 1)
    icnr_(doubling.weight)
    # Random biases would differ between the sub-pixels.
    nn.init.zeros_(doubling.get_parameter("bias"))
    return doubling


def icnr_(weight: Tensor) -> None:
    """Fill a (4C, D, 1, 1) weight in place so that the four sub-pixels of a position start equal: no checkerboard.

    Aitken et al. 2017.
    """
    with torch.no_grad():
        kernel = nn.init.kaiming_normal_(torch.empty_like(weight[::4]))
        weight.copy_(kernel.repeat_interleave(4, dim=0))
