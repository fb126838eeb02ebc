"""Decoded samples and their training views, seeded per sample.

Shapes: H W size of the view.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from multidomain_cct.data.batches.stored_mask import stored_mask
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.images import decode_smaller, decoded, load_image, open_image, upright_size
from multidomain_cct.data.shards.reader import BadSample, Record
from multidomain_cct.errors import UserError, require_number

PAD = (124, 116, 104)
"""Colour of padding: ImageNet's mean, close to 0 after any encoder's normalisation."""


@dataclass(frozen=True)
class Augment:
    """How training views differ from the stored image."""

    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Smallest and largest factor on the stored size, drawn uniformly."""
    long_side: list[int] = field(default_factory=list)
    """Smallest and largest length of the longer side in pixels; when given, it takes the place of `scale`."""
    flip: float = 0.5
    """Probability of a horizontal flip, 0 to 1."""

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"augment.scale is {self.scale}; it is [smallest, largest] with 0 < smallest <= largest.")
        if self.long_side and (len(self.long_side) != 2 or not 0 < self.long_side[0] <= self.long_side[1]):
            raise UserError(f"augment.long_side is {self.long_side}; it is [smallest, largest] in pixels, or empty.")
        require_number("augment.flip", self.flip, at_least=0, at_most=1)


def decode(record: Record, domain: Domain) -> tuple[Image.Image, Image.Image | None]:
    """A record's RGB image and its mask of train ids, both whole.

    Raises BadSample, naming shard and key, for bytes that are not an image and for a train id that the class table does
    not have.
    """
    with _bad_image():
        image = load_image(record.image, record.where)
    return image, None if record.mask is None else stored_mask(record.mask, domain, record.where)


@contextmanager
def _bad_image() -> Iterator[None]:
    try:
        yield
    except (UserError, ValueError) as error:
        raise BadSample(str(error), "image: cannot be read") from None


@dataclass(frozen=True)
class View:
    """A training view of one image."""

    key: str
    image: Tensor
    """(3, H, W) uint8, channels last in memory."""
    ids: Tensor
    """(H, W) uint8 train ids; 255 on padding, and everywhere without a mask."""
    inside: Tensor
    """(H, W) bool, False on padding."""


@dataclass(frozen=True)
class _Cut:
    """The part of an image that a view shows; all are (width, height) in pixels."""

    whole: tuple[int, int]
    """Size of the scaled image."""
    shown: tuple[int, int]
    """Size of the part in the view; the rest of the crop is padding."""
    corner: tuple[int, int]
    """Left and top of that part."""
    flip: bool

    @classmethod
    def draw(cls, size: tuple[int, int], augment: Augment, crop: tuple[int, int], rng: np.random.Generator) -> _Cut:
        factor = float(rng.uniform(augment.scale[0], augment.scale[1]))
        if augment.long_side:
            factor = float(rng.uniform(augment.long_side[0], augment.long_side[1])) / max(size)
        width, height = (max(1, round(side * factor)) for side in size)
        shown = min(width, crop[0]), min(height, crop[1])
        left, top = int(rng.integers(0, width - shown[0] + 1)), int(rng.integers(0, height - shown[1] + 1))
        return cls((width, height), shown, (left, top), bool(rng.random() < augment.flip))

    def box(self, extent: tuple[float, float]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the part, in whole pixels of a picture in which the image measures `extent`
        (width, height).
        """
        starts, ends = [], []
        for corner, shown, whole, pixels in zip(self.corner, self.shown, self.whole, extent, strict=True):
            count = min(max(1, round(shown * pixels / whole)), int(pixels))
            starts.append(min(round(corner * pixels / whole), int(pixels) - count))
            ends.append(starts[-1] + count)
        return starts[0], starts[1], ends[0], ends[1]


def training_view(
    record: Record, domain: Domain, augment: Augment, crop: tuple[int, int], rng: np.random.Generator
) -> View:
    """A random view of a record; crop is (width, height). Where the scaled image is smaller than the crop, the rest is
    padding.

    Scale and position are drawn before decoding, so that a JPEG can be decoded at reduced scale. Raises BadSample as
    `decode` does, and when image and mask differ in size.
    """
    where = record.where
    with _bad_image():
        image = open_image(record.image, where)
        size = upright_size(image, where)
    cut = _Cut.draw(size, augment, crop, rng)
    with _bad_image():
        extent = decode_smaller(image, where, cut.whole)
        whole = decoded(image, where)
    if whole.size != tuple(map(math.ceil, extent)):
        # Pillow would fill the area beyond the picture with black.
        raise BadSample(
            f"{where}: the image is {size[0]}x{size[1]} by its header, but {whole.width}x{whole.height} when decoded. "
            "Store it as a JPEG.",
            "image: another size than its header says",
        )
    box = cut.box(extent)
    width, height = cut.shown
    # torchvision resizes several times faster than Pillow when channels are last.
    part = F.resize(image_tensor(whole.crop(box)), [height, width], antialias=True)
    ids = torch.full((crop[1], crop[0]), IGNORE, dtype=torch.uint8)
    if record.mask is not None:
        mask = stored_mask(record.mask, domain, where)
        if mask.size != size:
            raise BadSample(
                f"{where}: the mask is {mask.width}x{mask.height} but the image is {size[0]}x{size[1]}. Pack the split "
                "again.",
                "mask: another size than the image",
            )
        # JPEGs are decoded smaller by a whole factor.
        left, top, right, bottom = (edge * round(size[0] / extent[0]) for edge in box)
        ids[:height, :width] = mask_tensor(
            mask.resize(cut.shown, Image.Resampling.NEAREST, box=(left, top, right, bottom))
        )
    inside = torch.zeros(crop[1], crop[0], dtype=torch.bool)
    inside[:height, :width] = True
    layers = (_padded(part, crop), ids, inside)
    return View(record.key, *(layer.flip(-1) if cut.flip else layer for layer in layers))


def _padded(part: Tensor, crop: tuple[int, int]) -> Tensor:
    """The image with padding on the right and below up to the crop's size."""
    height, width = part.shape[1:]
    if (width, height) == crop:
        return part
    # Filled pixel by pixel, channels last: torchvision pads channel by channel, which is slower.
    row = torch.tensor(PAD, dtype=torch.uint8).repeat(crop[0], 1)
    image = row.repeat(crop[1], 1, 1).permute(2, 0, 1)
    image[:, :height, :width] = part
    return image


def image_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8, channels last in memory, of an RGB image."""
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
    )


def mask_tensor(mask: Image.Image) -> Tensor:
    """(H, W) uint8 train ids."""
    return torch.from_numpy(np.array(mask))
