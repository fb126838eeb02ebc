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
from multidomain_cct.errors import UserError

PAD = (124, 116, 104)
"""Colour of the area beyond the image: ImageNet's mean, close to 0 after any encoder's normalisation."""


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
        if not 0 <= self.flip <= 1:
            raise UserError(f"augment.flip is {self.flip}; a probability lies in 0 to 1.")


def decode(record: Record, domain: Domain) -> tuple[Image.Image, Image.Image | None]:
    """A record's RGB image and its mask of train ids, both whole.

    Raises BadSample, naming shard and key, for bytes that are not an image and for a train id that the class table does
    not have.
    """
    where = _place(record)
    with _errors_of_the_image():
        image = load_image(record.image, where)
    return image, None if record.mask is None else stored_mask(record.mask, domain, where)


def _place(record: Record) -> str:
    return f"{record.shard}: key {record.key!r}"


@contextmanager
def _errors_of_the_image() -> Iterator[None]:
    try:
        yield
    except (UserError, ValueError) as error:
        raise BadSample(str(error), "image: cannot be read") from None


@dataclass(frozen=True)
class View:
    """A training view of one image."""

    image: Tensor
    """(3, H, W) uint8, channels last in memory."""
    ids: Tensor
    """(H, W) uint8 train ids; 255 on padding, and everywhere without a mask."""
    inside: Tensor
    """(H, W) bool, False on padding."""


@dataclass(frozen=True)
class _Cut:
    """What a view shows; all are (width, height) in pixels."""

    whole: tuple[int, int]
    """The image once it is scaled."""
    shown: tuple[int, int]
    """The part of it in the view; what is missing to the crop is padding."""
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
        """Left, top, right and bottom, in pixels of a picture, of the part that is shown; `extent` is what the whole
        image measures in these pixels.
        """
        starts, ends = zip(*map(_whole_pixels, self.corner, self.shown, self.whole, extent), strict=True)
        return (*starts, *ends)


def _whole_pixels(corner: int, shown: int, whole: int, extent: float) -> tuple[int, int]:
    """Along one axis, start and end of what is shown: whole pixels of which none lies beyond the extent."""
    count = min(max(1, round(shown * extent / whole)), int(extent))
    start = min(round(corner * extent / whole), int(extent) - count)
    return start, start + count


def training_view(
    record: Record, domain: Domain, augment: Augment, crop: tuple[int, int], rng: np.random.Generator
) -> View:
    """A random view of a record; crop is (width, height). Where the scaled image is smaller than the crop, the rest is
    padding.

    What is shown is drawn before anything is decoded, so that a JPEG of which a smaller version will do is decoded as
    that. Raises BadSample as `decode` does, and when image and mask differ in size.
    """
    where = _place(record)
    with _errors_of_the_image():
        image = open_image(record.image, where)
        size = upright_size(image, where)
    cut = _Cut.draw(size, augment, crop, rng)
    with _errors_of_the_image():
        extent = decode_smaller(image, where, cut.whole)
        whole = decoded(image, where)
    if whole.size != tuple(map(math.ceil, extent)):
        # Pillow would fill what lies beyond the picture with black.
        message = (
            f"{where}: the image was to be {size[0]}x{size[1]} by its header, but its pixels are others "
            f"({whole.width}x{whole.height}). Store it as a JPEG."
        )
        raise BadSample(message, "image: another size than its header says")
    box = cut.box(extent)
    width, height = cut.shown
    # torchvision resizes several times faster than Pillow when channels are last.
    part = F.resize(image_tensor(whole.crop(box)), [height, width], antialias=True)
    ids = torch.full((crop[1], crop[0]), IGNORE, dtype=torch.uint8)
    if record.mask is not None:
        mask = stored_mask(record.mask, domain, where)
        if mask.size != size:
            message = (
                f"{where}: the mask is {mask.width}x{mask.height} but the image is {size[0]}x{size[1]}. Pack the "
                "split again."
            )
            raise BadSample(message, "mask: another size than the image")
        # An image that is decoded smaller is so by a whole factor.
        left, top, right, bottom = (edge * round(size[0] / extent[0]) for edge in box)
        ids[:height, :width] = mask_tensor(
            mask.resize(cut.shown, Image.Resampling.NEAREST, box=(left, top, right, bottom))
        )
    inside = torch.zeros(crop[1], crop[0], dtype=torch.bool)
    inside[:height, :width] = True
    view = View(_padded(part, crop), ids, inside)
    return View(view.image.flip(-1), view.ids.flip(-1), view.inside.flip(-1)) if cut.flip else view


def _padded(part: Tensor, crop: tuple[int, int]) -> Tensor:
    """The image with padding on the right and below up to the crop's size."""
    height, width = part.shape[1:]
    if (width, height) == crop:
        return part
    # A row of pixels at a time: torchvision pads one channel after the other.
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
