"""A domain: one data set with one label space, read from one YAML file.

Number of classes, palette and the lookups from raw ids or colours to train ids are computed from the class table. A
train id is a class's position in the table.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import yaml

IGNORE = 255
"""Train id of pixels without a class, which are neither trained on nor scored."""

LAYOUTS = ("folder", "cityscapes", "camvid", "sun_rgbd", "voc", "toy")


@dataclass(frozen=True)
class LabelClass:
    """One row of a domain's class table."""

    name: str
    color: tuple[int, int, int]
    """RGB colour of the class in pictures; also its raw colour unless `colors` is set."""
    ids: tuple[int, ...] | None = None
    """Raw ids in single-channel masks. If no class has any: the position in the table."""
    colors: tuple[tuple[int, int, int], ...] = ()
    """Raw colours in RGB masks. Empty: `color`."""
    names: tuple[str, ...] = ()
    """Raw names in annotations (COCO, CVAT, Labelme, folders of masks by class). Empty: `name`."""
    thing: bool = False
    """True for countable objects (car, person, chair), False for stuff (road, sky, wall)."""


@dataclass(frozen=True)
class Split:
    """Where the raw files of a split lie. Only the layout `folder` needs the globs."""

    images: str = ""
    """Glob of the images, relative to the raw folder; or a list, list.txt, with an image and its mask on each line."""
    masks: str = ""
    """Glob of the masks, with {class} for a class's name if there is a mask for each class; or of annotations: COCO's
    .json or CVAT's .xml for the whole split, Labelme's .json or YOLO's .txt for each image. Empty: unlabelled.
    """


@dataclass(frozen=True)
class Domain:
    """Facts about one data set. Everything below the class table is derived from it."""

    name: str
    layout: str
    """How the raw tree is laid out; one of LAYOUTS."""
    splits: dict[str, Split]
    classes: tuple[LabelClass, ...]
    labels_of: str = ""
    """Another domain whose label space and head this one shares. Empty: its own."""
    title: str = ""
    licence: str = ""
    source: str = ""
    """Where the data set is published."""
    size: tuple[int, int] | None = None
    """Box (width, height) into which `pack` shrinks images, keeping their aspect ratio; None: the original size."""
    score_at_full_size: tuple[str, ...] = ("val", "test")
    """Splits whose masks are packed at their own resolution, at which they are then scored."""
    unknown: str = "ignore"
    """How `pack` treats raw values outside the table: `ignore` (they become 255 and are counted) or `error`."""
    ignore_ids: tuple[int, ...] = (IGNORE,)
    """Raw ids that mean "no class"."""
    ignore_colors: tuple[tuple[int, int, int], ...] = ()
    """Raw colours that mean "no class"."""
    ignore_names: tuple[str, ...] = ()
    """Raw names that mean "no class"."""
    background: str = ""
    """The class of pixels outside all areas of annotations, or `ignore`. Needed by annotations, unused by masks."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8 RGB: one row per train id; ids without a class are black."""
        table = np.zeros((256, 3), dtype=np.uint8)
        for train_id, label in enumerate(self.classes):
            table[train_id] = label.color
        return table

    @cached_property
    def id_lookup(self) -> tuple[np.ndarray, np.ndarray]:
        """(65536,) uint8 train ids by raw id, 255 where none, and (65536,) bool: whether the table has the id."""
        train = np.full(65536, IGNORE, dtype=np.uint8)
        known = np.zeros(65536, dtype=bool)
        known[list(self.ignore_ids)] = True
        for train_id, label in enumerate(self.classes):
            ids = [train_id] if label.ids is None else list(label.ids)
            train[ids] = train_id
            known[ids] = True
        return train, known

    @cached_property
    def color_lookup(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted int64 raw colours (r << 16 | g << 8 | b) and the uint8 train id of each."""
        pairs = [(color, IGNORE) for color in self.ignore_colors]
        for train_id, label in enumerate(self.classes):
            pairs += [(color, train_id) for color in (label.colors or (label.color,))]
        pairs.sort()
        codes = np.array([r << 16 | g << 8 | b for (r, g, b), _ in pairs], dtype=np.int64)
        return codes, np.array([train_id for _, train_id in pairs], dtype=np.uint8)

    @cached_property
    def name_lookup(self) -> dict[str, int]:
        """The train id of each raw name."""
        train_ids = dict.fromkeys(self.ignore_names, IGNORE)
        for train_id, label in enumerate(self.classes):
            train_ids.update(dict.fromkeys(label.names or (label.name,), train_id))
        return train_ids

    @property
    def background_id(self) -> int:
        """The train id of pixels outside all areas of annotations."""
        names = [label.name for label in self.classes]
        return names.index(self.background) if self.background in names else IGNORE

    @property
    def class_fingerprint(self) -> str:
        """Hex digest of the class names in order, which define the train ids."""
        return hashlib.sha256(json.dumps([label.name for label in self.classes]).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The specification as YAML; reading it back gives an equal Domain."""
        # Through JSON, because YAML has no tuples.
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        plain["size"] = plain["size"] or "original"
        for row in plain["classes"]:
            # No ids (null) means the position in the table, an empty list means none.
            if row["ids"] is None:
                del row["ids"]
            for optional in ("colors", "names"):
                if not row[optional]:
                    del row[optional]
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=160)
