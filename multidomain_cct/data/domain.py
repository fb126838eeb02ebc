"""A domain: one data set with one label space, read from one YAML file.

The class table is the only source of label facts. Number of classes, palette, and the lookup from raw ids or colours to
train ids are computed from it. A train id is a class's position in the table.
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
"""Train id of a pixel that has no class: never trained on, never scored."""

LAYOUTS = ("folder", "cityscapes", "camvid", "sun_rgbd", "voc", "toy")


@dataclass(frozen=True)
class LabelClass:
    """One row of a domain's class table."""

    name: str
    color: tuple[int, int, int]
    """RGB colour of the class in pictures; also its raw colour unless `colors` says otherwise."""
    ids: tuple[int, ...] | None = None
    """Raw ids in single-channel masks. Absent for every class: the position in the table."""
    colors: tuple[tuple[int, int, int], ...] = ()
    """Raw colours in RGB masks. Empty: `color`."""
    thing: bool = False
    """True for countable objects (car, person, chair), False for stuff (road, sky, wall)."""


@dataclass(frozen=True)
class Split:
    """Where the raw files of a split lie. Only the layout `folder` needs the globs."""

    images: str = ""
    """Glob of the images, relative to the raw folder."""
    masks: str = ""
    """Glob of the masks; empty for an unlabelled split."""


@dataclass(frozen=True)
class Domain:
    """Facts about one data set. Everything below the class table is derived from it."""

    name: str
    layout: str
    """How the raw tree is laid out; one of LAYOUTS."""
    splits: dict[str, Split]
    classes: tuple[LabelClass, ...]
    labels_of: str = ""
    """Another domain whose label space this one has: it is trained and predicted with that domain's head. Empty: its
    own.
    """
    title: str = ""
    licence: str = ""
    source: str = ""
    """Where the data set is published."""
    size: tuple[int, int] | None = None
    """Box (width, height) into which `pack` fits the images, keeping their aspect ratio and never enlarging; None keeps
    the original size.
    """
    score_at_full_size: tuple[str, ...] = ("val", "test")
    """Splits whose masks keep their own resolution when packed, so that scores are at the labels' resolution."""
    unknown: str = "ignore"
    """What `pack` does with raw values that nothing names: `ignore` (becomes 255, counted) or `error`."""
    ignore_ids: tuple[int, ...] = (IGNORE,)
    """Raw ids that are known to mean "no class"."""
    ignore_colors: tuple[tuple[int, int, int], ...] = ()
    """Raw colours that are known to mean "no class"."""

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
        """Two arrays of length 65536 over raw ids: uint8 train ids (255 where none), and bool, whether the table knows
        the id.
        """
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

    @property
    def class_fingerprint(self) -> str:
        """Hex digest of what gives a train id its meaning: the names, in order."""
        return hashlib.sha256(json.dumps([label.name for label in self.classes]).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The specification as YAML; reading it back gives an equal Domain."""
        plain: dict[str, Any] = _plain(asdict(self))
        plain["size"] = plain["size"] or "original"
        for row in plain["classes"]:
            # No ids at all (null) and an empty list differ: the first means the position in the table.
            if row["ids"] is None:
                del row["ids"]
            if not row["colors"]:
                del row["colors"]
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=160)


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
