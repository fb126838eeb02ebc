"""Annotation files -> the shapes of each image: COCO, CVAT, Labelme and YOLO."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from multidomain_cct.data.images import load_mask
from multidomain_cct.data.packing.shapes import Annotation, Area, Bitmap, CocoRle, Polygons, Shape, ellipse, polygon
from multidomain_cct.errors import UserError

YOLO_SLACK = 0.001
"""By how much rounding may move a YOLO coordinate out of 0 to 1."""
_MOST_PIXELS = 2**28
"""Of one mask; more would fill the memory."""
_BROKEN = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)
"""What a file of the right kind with something else inside raises."""


def annotations_of_one(path: Path, size: tuple[int, int]) -> Annotation:
    """The shapes in a file of one image of (width, height): Labelme's .json or YOLO's .txt.

    Raises UserError, naming the file, when it cannot be read.
    """
    if path.suffix.lower() == ".txt":
        return _yolo(path, size)
    content = read_json(path)
    if not is_labelme(content):
        raise UserError(f"{path}: has no `shapes`; Labelme's files have. Name COCO's file itself, without a star.")
    return labelme(path, content)


def annotations_of_many(path: Path) -> Mapping[str, Annotation]:
    """The shapes of each image by the name in the file: COCO's .json or CVAT's .xml.

    Raises UserError, naming the file, when it cannot be read.
    """
    state = path.stat()
    return _annotations_of_many(path, state.st_mtime_ns, state.st_size)


# Every split looks at the files of all splits, and `pack` lists a split twice.
@lru_cache(maxsize=8)
def _annotations_of_many(path: Path, modified: int, size: int) -> Mapping[str, Annotation]:
    return _cvat(path) if path.suffix.lower() == ".xml" else _coco(path, read_json(path))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). Fetch or export it again.") from None


def is_labelme(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def is_coco(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(k), list) for k in ("images", "annotations"))


@contextmanager
def _named(where: str) -> Iterator[None]:
    """What a broken entry raises becomes a UserError."""
    try:
        yield
    except _BROKEN as error:
        problem = f"has no {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        raise UserError(f"{where} {problem}. Export it again.") from None


def _coco(path: Path, content: Any) -> dict[str, Annotation]:
    if not is_coco(content) or not isinstance(content.get("categories"), list):
        raise UserError(
            f"{path}: has no lists `images`, `annotations` and `categories`, so it is not COCO. Other known JSON is "
            "Labelme's, one file an image: annotations/*.json."
        )
    with _named(f"{path}: categories"):
        categories = {row["id"]: str(row["name"]) for row in content["categories"]}
    images: dict[Any, tuple[str, tuple[int, int] | None]] = {}
    for position, row in enumerate(content["images"]):
        with _named(f"{path}: images[{position}]"):
            sized = "width" in row and "height" in row
            images[row["id"]] = str(row["file_name"]), (int(row["width"]), int(row["height"])) if sized else None
    shapes: dict[Any, list[Shape]] = {image_id: [] for image_id in images}
    for position, row in enumerate(content["annotations"]):
        with _named(f"{path}: annotations[{position}]"):
            name = f"annotation {row.get('id', f'at position {position}')}"
            if row["image_id"] not in images or row["category_id"] not in categories:
                key = "image_id" if row["image_id"] not in images else "category_id"
                raise UserError(f"{path}: {name} has the {key} {row[key]!r}, which the file lacks. Export it again.")
            area = _coco_area(row.get("segmentation"), f"{path}: {name}")
            shapes[row["image_id"]].append(Shape(categories[row["category_id"]], name, area))
    return _by_name(path, ((name, Annotation(tuple(shapes[key]), size)) for key, (name, size) in images.items()))


def _coco_area(segmentation: Any, where: str) -> Area:
    if not segmentation:
        raise UserError(
            f"{where} has no segmentation, only a box. Boxes are not masks: export polygons or RLE, or remove it."
        )
    if isinstance(segmentation, dict):
        if importlib.util.find_spec("pycocotools") is None:
            raise UserError(
                f"{where} is in run lengths (RLE). To read them: pip install 'multidomain-cct[coco]', or export "
                "polygons."
            )
        height, width = segmentation["size"]
        counts = segmentation["counts"]
        return CocoRle((int(width), int(height)), counts if isinstance(counts, str) else tuple(map(int, counts)))
    return Polygons(tuple(polygon(part, where) for part in segmentation))


def _by_name(path: Path, annotations: Iterator[tuple[str, Annotation]]) -> dict[str, Annotation]:
    named: dict[str, Annotation] = {}
    for name, annotation in annotations:
        if name in named:
            raise UserError(f"{path}: lists the image {name} twice. Merge the two, or remove one.")
        named[name] = annotation
    return named


def _cvat(path: Path) -> dict[str, Annotation]:
    root = read_xml(path)
    if root.tag != "annotations" or root.find("track") is not None:
        what = "tracks of a video" if root.tag == "annotations" else f"the root <{root.tag}>"
        raise UserError(f"{path}: has {what}. Of XML, CVAT's is read: export the task as `CVAT for images 1.1`.")
    return _by_name(path, map(lambda image: _cvat_image(path, image), root.iter("image")))


def read_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(path.read_bytes())
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as XML ({error}). Fetch or export it again.") from None


def _cvat_image(path: Path, image: ElementTree.Element) -> tuple[str, Annotation]:
    shapes, num_left_out = [], 0
    with _named(f"{path}: an <image>"):
        name, size = image.attrib["name"], (int(image.attrib["width"]), int(image.attrib["height"]))
    for position, element in enumerate(image):
        title = f"{element.tag} {position + 1} of {name}"
        with _named(f"{path}: {title}"):
            area = _cvat_area(element.tag, element.attrib, f"{path}: {title}")
            if area is None:
                num_left_out += 1
            else:
                shapes.append(Shape(element.attrib["label"], title, area, int(element.get("z_order", 0))))
    return name, Annotation(tuple(shapes), size, num_left_out)


def _cvat_area(tag: str, values: Mapping[str, str], where: str) -> Area | None:
    """The area of an element; None for points, lines, tags and what else covers no pixels."""
    if tag == "polygon":
        return Polygons((polygon(values["points"].replace(";", ",").split(","), where),))
    if tag == "mask":
        # Row by row within the box, beginning with a run outside.
        runs = [int(count) for count in values["rle"].split(",")]
        width, height = int(values["width"]), int(values["height"])
        if sum(runs) != width * height or width * height > _MOST_PIXELS:
            raise ValueError(f"its runs have {sum(runs)} pixels, and its box {width}x{height}")
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
        return Bitmap(int(values["left"]), int(values["top"]), inside)
    if tag == "box":
        left, top, right, bottom = (float(values[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        corners = _box(left, top, right, bottom)
    elif tag == "ellipse":
        corners = ellipse((float(values["cx"]), float(values["cy"])), (float(values["rx"]), float(values["ry"])))
    else:
        return None
    return Polygons((_turned(corners, float(values.get("rotation", 0))),))


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _turned(corners: np.ndarray, degrees: float) -> np.ndarray:
    """Points turned clockwise about the middle of their box."""
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned: np.ndarray = (corners - middle) @ np.array([[cos, sin], [-sin, cos]]) + middle
    return turned


def labelme(path: Path, content: Mapping[str, Any]) -> Annotation:
    """The shapes in the content of a file of Labelme."""
    shapes, num_left_out = [], 0
    for position, row in enumerate(content["shapes"]):
        name = f"shape {position + 1}"
        with _named(f"{path}: {name}"):
            area = _labelme_area(row, f"{path}: {name}")
            if area is None:
                num_left_out += 1
            else:
                shapes.append(Shape(str(row["label"]), name, area))
    with _named(f"{path}: imageWidth or imageHeight"):
        width, height = content.get("imageWidth"), content.get("imageHeight")
        size = None if width is None or height is None else (int(width), int(height))
    return Annotation(tuple(shapes), size, num_left_out)


def _labelme_area(row: Mapping[str, Any], where: str) -> Area | None:
    """The area of a shape; None for points and lines."""
    kind, points = row.get("shape_type") or "polygon", [(float(x), float(y)) for x, y in row["points"]]
    if kind in ("polygon", "oriented_rectangle"):
        return Polygons((polygon([value for point in points for value in point], where),))
    if kind == "rectangle":
        (left, top), (right, bottom) = points
        return Polygons((_box(left, top, right, bottom),))
    if kind == "circle":
        radius = math.dist(*points)
        return Polygons((ellipse(points[0], (radius, radius)),))
    if kind == "mask":
        try:
            source = base64.b64decode(row["mask"], validate=True)
        except binascii.Error as error:
            raise UserError(f"{where} has a mask that is not base64 ({error}). Export it again.") from None
        _, pixels = load_mask(source, where, ("PNG",))
        if pixels.ndim != 2:
            raise ValueError("its mask has colours")
        return Bitmap(int(points[0][0]), int(points[0][1]), pixels > 0)
    return None


def _yolo(path: Path, size: tuple[int, int]) -> Annotation:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: this is not text in UTF-8. YOLO's lines are a class number and x y x y ...") from None
    shapes = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            shapes.append(_yolo_shape(line.split(), size, f"line {number}", f"{path}: line {number}"))
    return Annotation(tuple(shapes))


def _yolo_shape(words: list[str], size: tuple[int, int], name: str, where: str) -> Shape:
    if not words[0].isdecimal():
        raise UserError(f"{where} begins with {words[0]!r}; a line is a class number and x y x y ... from 0 to 1.")
    if len(words) == 5:
        raise UserError(f"{where} has 4 numbers after the class, a box. Boxes are not masks: export polygons.")
    points = polygon(words[1:], where)
    outside = points[(points < -YOLO_SLACK) | (points > 1 + YOLO_SLACK)]
    if len(outside):
        raise UserError(
            f"{where} has the coordinate {outside[0]:g}; YOLO's are from 0 to 1, shares of the image's width and "
            "height. Divide by the size, or export it again."
        )
    return Shape(int(words[0]), name, Polygons((points * size,)))
