"""Pictures of train ids: class colours, overlays with a legend, maps of the errors.

Shapes: H W picture size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from multidomain_cct.data.domain import IGNORE, Domain, LabelClass
from multidomain_cct.files.printable import printable

RIGHT, WRONG, IGNORED = (72, 72, 72), (225, 45, 45), (0, 0, 0)
"""Colours of an error map."""
OPACITY = 0.55
"""Of an overlay, 0 to 1."""
_PAPER, _INK = (255, 255, 255), (32, 32, 32)
_NAME_LENGTH = 32
_ALIKE = 40.0
"""Colours look alike below this Euclidean distance, of 0 to 441."""


def colored(ids: np.ndarray, domain: Domain) -> Image.Image:
    """The (H, W) uint8 train ids in the classes' colours, RGB; ids without a class are black."""
    return indexed(ids, domain).convert("RGB")


def indexed(ids: np.ndarray, domain: Domain) -> Image.Image:
    """A palette image whose indices are the (H, W) uint8 train ids; viewers show the classes' colours."""
    image = Image.fromarray(ids)
    image.putpalette(domain.palette.tobytes(), "RGB")
    return image


def overlay(image: Image.Image, ids: np.ndarray, domain: Domain, opacity: float = OPACITY) -> Image.Image:
    """The RGB image with the classes' colours laid over it; opacity is 0 to 1.

    Where the id is 255, and under classes that mean "nothing" (`is_clear`), the image stays as it is.
    """
    strength = np.zeros(256, dtype=np.uint8)
    strength[: domain.num_classes] = [0 if is_clear(label) else round(255 * opacity) for label in domain.classes]
    return Image.composite(colored(ids, domain), image, Image.fromarray(strength[ids]))


def is_clear(label: LabelClass) -> bool:
    """Whether an overlay leaves the class transparent: stuff that is named background, or painted black."""
    return not label.thing and (label.name.strip("_ ").casefold() == "background" or label.color == (0, 0, 0))


def with_distinct_colors(domain: Domain) -> Domain:
    """The domain with each colour that looks like an earlier class's replaced by one unlike all others."""
    cube = np.stack(np.meshgrid(*[np.arange(20, 256, 45)] * 3), axis=-1).reshape(-1, 3)
    table = domain.palette[: domain.num_classes].astype(int)
    for number in range(1, len(table)):
        if _nearest(table[number : number + 1], table[:number]) < _ALIKE:
            others = np.delete(table, number, axis=0)
            table[number] = cube[int(np.argmax([_nearest(each[None], others) for each in cube]))]
    colors = [(int(red), int(green), int(blue)) for red, green, blue in table]
    classes = (replace(label, color=color) for label, color in zip(domain.classes, colors, strict=True))
    return replace(domain, classes=tuple(classes))


def _nearest(color: np.ndarray, others: np.ndarray) -> float:
    """The (1, 3) colour's distance from the nearest of the (n, 3) others."""
    return float(np.linalg.norm(others - color, axis=1).min())


def legend(domain: Domain, present: Iterable[int], *, width: int = 320, text_size: int = 14) -> Image.Image:
    """A swatch and a name for each of the train ids that are present, in columns; at least `width` pixels wide.

    The swatch of a class that an overlay leaves transparent is empty.
    """
    rows = [
        (_short(label.name), _PAPER if is_clear(label) else label.color)
        for label in (domain.classes[train_id] for train_id in sorted(set(present)) if train_id < domain.num_classes)
    ]
    if IGNORE in present:
        rows.append(("no class", IGNORED))
    font = ImageFont.load_default(size=text_size)
    gap, line = round(0.6 * text_size), round(1.6 * text_size)
    cell = text_size + 3 * gap + max((round(font.getlength(name)) for name, _ in rows), default=0)
    columns = max(1, min(len(rows), (width - gap) // cell))
    height = -(-len(rows) // columns) * line + gap
    picture = Image.new("RGB", (max(width, columns * cell + gap), height), _PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (name, color) in enumerate(rows):
        left, middle = gap + number % columns * cell, gap // 2 + number // columns * line + line // 2
        top = middle - text_size // 2
        draw.rectangle(
            (left, top, left + text_size, top + text_size), fill=color, outline=_INK, width=max(1, text_size // 14)
        )
        draw.text((left + text_size + gap, middle), name, fill=_INK, font=font, anchor="lm")
    return picture


def with_legend(image: Image.Image, legend: Image.Image) -> Image.Image:
    """The image with the legend below it, both unscaled."""
    page = Image.new("RGB", (max(image.width, legend.width), image.height + legend.height), _PAPER)
    page.paste(image, (0, 0))
    page.paste(legend, (0, image.height))
    return page


def error_map(truth: np.ndarray, prediction: np.ndarray) -> Image.Image:
    """Where (H, W) predicted train ids are right (grey), wrong (red), or not scored, where the truth is 255 (black)."""
    colors = np.array([RIGHT, WRONG, IGNORED], dtype=np.uint8)
    kind = np.where(truth == IGNORE, 2, (truth != prediction).astype(np.uint8))
    return Image.fromarray(colors[kind])


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
