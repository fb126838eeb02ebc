"""Decoded samples and their training views, seeded per sample.

Shapes: H W size of the view.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.encode import load_image
from multidomain_cct.data.shards import BadSample, Record
from multidomain_cct.data.stored_mask import stored_mask

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
            raise ValueError(f"augment.scale is {self.scale}; it is [smallest, largest] with 0 < smallest <= largest.")
        if self.long_side and (len(self.long_side) != 2 or not 0 < self.long_side[0] <= self.long_side[1]):
            raise ValueError(f"augment.long_side is {self.long_side}; it is [smallest, largest] in pixels, or empty.")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augment.flip is {self.flip}; a probability lies in 0 to 1.")


def decode(record: Record, domain: Domain) -> tuple[Image.Image, Image.Image | None]:
    """A record's RGB image and its mask of train ids.

    Raises BadSample, naming shard and key, for bytes that are not an image and for a train id that the class table does not have.
    """
    where = f"{record.shard}: key {record.key!r}"
    try:
        image = load_image(record.image, where)
    except ValueError as error:
        raise BadSample(str(error), "image: cannot be read") from None
    return image, None if record.mask is None else stored_mask(record.mask, domain, where)


@dataclass(frozen=True)
class View:
    """A training view of one image."""

    image: Tensor
    """(3, H, W) uint8."""
    ids: Tensor
    """(H, W) uint8 train ids; 255 on padding, and everywhere without a mask."""
    inside: Tensor
    """(H, W) bool, False on padding."""


def training_view(image: Image.Image, mask: Image.Image | None, augment: Augment, crop: tuple[int, int], rng: np.random.Generator) -> View:
    """A random view; crop is (width, height). Where the scaled image is smaller than the crop, the rest is padding."""
    factor = float(rng.uniform(augment.scale[0], augment.scale[1]))
    if augment.long_side:
        factor = float(rng.uniform(augment.long_side[0], augment.long_side[1])) / max(image.size)
    scaled = [max(1, round(side * factor)) for side in image.size]
    kept = [min(side, limit) for side, limit in zip(scaled, crop, strict=True)]
    corner = [int(rng.integers(0, side - part + 1)) for side, part in zip(scaled, kept, strict=True)]
    # Only the region that the crop shows is resized; the box is in the stored image's coordinates.
    ratio = [side / length for side, length in zip(image.size, scaled, strict=True)]
    box = (corner[0] * ratio[0], corner[1] * ratio[1], (corner[0] + kept[0]) * ratio[0], (corner[1] + kept[1]) * ratio[1])
    flip = bool(rng.random() < augment.flip)

    pixels = Image.new("RGB", crop, PAD)
    pixels.paste(image.resize((kept[0], kept[1]), Image.Resampling.BILINEAR, box=box))
    ids = Image.new("L", crop, IGNORE)
    if mask is not None:
        ids.paste(mask.resize((kept[0], kept[1]), Image.Resampling.NEAREST, box=box))
    inside = torch.zeros(crop[1], crop[0], dtype=torch.bool)
    inside[: kept[1], : kept[0]] = True
    view, target = F.pil_to_tensor(pixels), F.pil_to_tensor(ids)[0]
    return View(F.horizontal_flip(view), target.flip(-1), inside.flip(-1)) if flip else View(view, target, inside)


def whole_view(image: Image.Image) -> Tensor:
    """The image as it is: (3, H, W) uint8."""
    pixels: Tensor = F.pil_to_tensor(image)
    return pixels


def mask_tensor(mask: Image.Image) -> Tensor:
    """(H, W) uint8 train ids."""
    return torch.from_numpy(np.array(mask))
