"""Areas that annotation files describe, drawn as train ids.

Coordinates are in pixels from the upper left corner of the image: the first pixel covers 0 to 1 in x and y, and belongs
to an area that contains its centre. Where areas overlap, the smaller one is on top.

Shapes: H W size of the image.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.images import load_mask
from multidomain_cct.errors import UserError, did_you_mean
from multidomain_cct.files.printable import first_few

Patch = tuple[int, int, np.ndarray]
"""Column and row of a bool array's upper left corner in the image, and the array."""


class Area(Protocol):
    """Part of an image. `where` begins the message of a UserError for an area that cannot be drawn."""

    def patch(self, size: tuple[int, int], where: str) -> Patch:
        """The pixels of the area in an image of (width, height)."""


@dataclass(frozen=True)
class Polygons:
    """The union of polygons, each (N, 2) points x and y."""

    polygons: tuple[np.ndarray, ...]

    def patch(self, size: tuple[int, int], where: str) -> Patch:
        points = np.concatenate(self.polygons)
        if not (abs(points - np.array(size) / 2) <= 2 * np.array(size)).all():
            raise UserError(
                f"{where} has a point far outside its image of {size[0]}x{size[1]} pixels. Coordinates are pixels of "
                "the image; export it again."
            )
        left, top = np.floor(points.min(axis=0)).astype(int).clip(min=0).tolist()
        right, bottom = np.ceil(points.max(axis=0)).astype(int).clip(max=size).tolist()
        inside = np.zeros((max(0, bottom - top), max(0, right - left)), dtype=bool)
        for corners in self.polygons:
            inside |= _filled(corners - (left, top), *inside.shape)
        return left, top, inside


def _filled(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) bool: which pixels' centres a polygon (N, 2) contains; where it overlaps itself, even and odd alternate.

    Pillow's ImageDraw cuts coordinates to whole pixels and includes the edges: areas of 270 pixels became 8 % larger.
    """
    inside = np.zeros((height, width + 1), dtype=bool)
    (x, y), (next_x, next_y) = corners.T - 0.5, np.roll(corners, -1, axis=0).T - 0.5
    first, last = (np.ceil(ends).clip(0, height).astype(int) for ends in (np.minimum(y, next_y), np.maximum(y, next_y)))
    # Every edge with every row of centres that it crosses.
    edge = np.repeat(np.arange(len(x)), last - first)
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - last, last - first)
    shares = (rows - y[edge]) / (next_y - y)[edge]
    columns = np.ceil(x[edge] + shares * (next_x - x)[edge]).clip(0, width).astype(int)
    # Not `^=`, which counts two edges that cross a row at the same place once.
    np.logical_xor.at(inside, (rows, columns), True)
    return np.logical_xor.accumulate(inside, axis=1)[:, :width]


@dataclass(frozen=True)
class CocoRle:
    """Run lengths of COCO, down the columns: a list of numbers, or pycocotools' text."""

    size: tuple[int, int]
    """(width, height)"""
    counts: Sequence[int] | str

    def patch(self, size: tuple[int, int], where: str) -> Patch:
        # An extra of this package; annotations.py asks for it before packing begins.
        from pycocotools import mask as coco

        if self.size != size:
            raise UserError(
                f"{where} has run lengths of {self.size[0]}x{self.size[1]} pixels, but its image is "
                f"{size[0]}x{size[1]}. Export the annotations at the size of the images."
            )
        try:
            if isinstance(self.counts, str):
                rle: Any = {"size": size[::-1], "counts": self.counts.encode("ascii")}
            elif min(self.counts, default=-1) < 0 or sum(self.counts) != size[0] * size[1]:
                raise ValueError
            else:
                rle = coco.frPyObjects({"size": size[::-1], "counts": list(self.counts)}, size[1], size[0])
            with warnings.catch_warnings():
                # Under numpy 2, pycocotools 2.0.11 warns of itself.
                warnings.simplefilter("ignore", DeprecationWarning)
                values: np.ndarray = coco.decode(rle)
            # Runs that end early leave memory as it was.
            if values.max(initial=0) > 1 or int(values.sum(dtype=np.int64)) != int(coco.area(rle)):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{where} has run lengths that do not give its image. Export it again.") from None
        return 0, 0, values.astype(bool)


@dataclass(frozen=True)
class Bitmap:
    """Pixels with the column and row of their upper left corner."""

    left: int
    top: int
    pixels: np.ndarray

    def patch(self, size: tuple[int, int], where: str) -> Patch:
        height, width = self.pixels.shape
        if min(self.left, self.top) < 0 or self.left + width > size[0] or self.top + height > size[1]:
            raise UserError(
                f"{where} covers columns {self.left} to {self.left + width} and rows {self.top} to {self.top + height},"
                f" but its image is {size[0]}x{size[1]}. Export it again."
            )
        return self.left, self.top, self.pixels


@dataclass(frozen=True)
class ClassMask:
    """An image file with 0 outside one class and one other value inside."""

    path: Path

    def patch(self, size: tuple[int, int], where: str) -> Patch:
        image, values = load_mask(self.path, where, ("PNG", "BMP", "TIFF", "GIF", "PPM"))
        if values.ndim == 3 and (values[..., :3] == values[..., :1]).all():
            # Black and white in three channels.
            values = values[..., 0]
        if values.ndim == 3 or len(found := np.unique(values)) > 2 or (len(found) == 2 and found[0] != 0):
            held = "colours" if values.ndim == 3 else f"the values {first_few([str(value) for value in found])}"
            raise UserError(
                f"{where}: holds {held}; the mask of one class holds 0 and one other value. Export it as a PNG in "
                "black and white, or name masks of several classes without {class}."
            )
        if image.size != size:
            raise UserError(
                f"{where}: the mask is {image.width}x{image.height} but its image is {size[0]}x{size[1]}. Export the "
                "mask upright and at the image's size."
            )
        return 0, 0, values > 0


@dataclass(frozen=True)
class Shape:
    """One object, or one part of an image, with its class."""

    label: str | int
    """The class's raw name, or its raw id."""
    name: str
    """What it is called in messages, such as "annotation 12"."""
    area: Area
    order: int = 0
    """Shapes of a higher order are on top of others, whatever their area."""


@dataclass(frozen=True)
class Annotation:
    """All shapes of one image."""

    shapes: tuple[Shape, ...]
    size: tuple[int, int] | None = None
    """(width, height) of the image as the file states it; None: it does not."""
    num_left_out: int = 0
    """Points, lines and tags, which cover no pixels."""

    def train_ids(self, domain: Domain, size: tuple[int, int], where: str) -> np.ndarray:
        """(H, W) uint8 train ids of an image of (width, height); the domain's background is where no shape is.

        Raises UserError, starting with `where`, for a shape that cannot be drawn and for a class without a row.
        """
        if self.size not in (None, size):
            raise UserError(
                f"{where}: is for an image of {self.size[0]}x{self.size[1]} pixels, but the image is "
                f"{size[0]}x{size[1]}. Export images and annotations at one size, with the images upright."
            )
        drawn = []
        for shape in self.shapes:
            name = f"{where}: {shape.name}" if shape.name else where
            train_id = shape_train_id(shape.label, domain, name)
            left, top, inside = shape.area.patch(size, name)
            drawn.append((shape.order, -int(inside.sum()), train_id, left, top, inside))
        ids = np.full(size[::-1], domain.background_id, dtype=np.uint8)
        for _, _, train_id, left, top, inside in sorted(drawn, key=lambda item: item[:2]):
            ids[top : top + inside.shape[0], left : left + inside.shape[1]][inside] = train_id
        return ids


def shape_train_id(label: str | int, domain: Domain, where: str) -> int:
    """The train id of a raw name or raw id, IGNORE for ignored ones. Raises UserError where the domain has none."""
    if isinstance(label, str):
        names = domain.name_lookup
        if label in names:
            return names[label]
        raise UserError(
            f'{where} has the class "{label}", which {domain.name} does not have.{did_you_mean(label, names)} Add it '
            "to `classes`, to the `names` of a class, or to `ignore_names`."
        )
    train, known = domain.id_lookup
    if 0 <= label < len(train) and known[label]:
        return int(train[label])
    ids = [str(raw_id) for raw_id in np.flatnonzero(known & (train != IGNORE)).tolist()]
    raise UserError(
        f"{where} has the class number {label}, which no class of {domain.name} has; known: {first_few(ids, 12)}. Add "
        "it to the `ids` of a class or to `ignore_ids`."
    )


def require_classes(annotations: Mapping[str, Annotation], domain: Domain, where: str) -> None:
    """Raises UserError when a shape has a class that the domain does not have, with the number of such shapes."""
    by_label: dict[str | int, list[str]] = {}
    for annotation in annotations.values():
        for shape in annotation.shapes:
            by_label.setdefault(shape.label, []).append(shape.name)
    for label, names in by_label.items():
        shape_train_id(label, domain, f"{where}: {names[0]}" + f" (the first of {len(names)})" * (len(names) > 1))


def require_background(domain: Domain) -> None:
    """Raises UserError when the domain does not say what the pixels outside all shapes are."""
    if not domain.background:
        names = first_few([label.name for label in domain.classes], 6)
        raise UserError(
            f"{domain.name}: background is missing. Its annotations are areas, so pixels outside all of them need a "
            f"class. Write `background: NAME` with one of its classes ({names}), or `background: ignore`."
        )


def polygon(coordinates: Sequence[Any], where: str) -> np.ndarray:
    """x y x y ... as (N, 2) points. Raises UserError, starting with `where`, unless they are at least 3 finite ones."""
    try:
        numbers = np.array(coordinates, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.array([math.nan])
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise UserError(f"{where} has coordinates that are not numbers. Export it again.")
    if len(numbers) % 2 or len(numbers) < 6:
        count = f"{len(numbers) // 2} points" if len(numbers) % 2 == 0 else f"{len(numbers)} coordinates"
        raise UserError(
            f"{where} has {count}; a polygon is at least 3 points, each x and y. Draw it again or remove it."
        )
    return numbers.reshape(-1, 2)


def ellipse(center: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    """An ellipse as a polygon of 72 points."""
    angles = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    points: np.ndarray = np.array(center) + np.array(radii) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return points
