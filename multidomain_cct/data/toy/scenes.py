"""Two drawn toy domains, a street and a room, with disjoint labels.

A scene is a handful of boxes, rectangles and discs seen through a random camera, at any hour and, in the street, in any
fog. Classes share colours (brick wall, autumn tree and red car; floor, table and chair) and differ in shape, texture
and position: a few labelled images show few of the hours, the unlabelled ones all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image

from multidomain_cct.data.toy.painter import Color, Scene, Span
from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import replacing

SPLITS = {"train": 240, "val": 60}
"""Images of each split; every one has a mask."""
CLASSES = {
    "toy_street": ("sky", "road", "building", "tree", "car", "person"),
    "toy_room": ("wall", "floor", "window", "table", "chair", "lamp"),
}
"""Class names; a raw id is a position here."""

SKY, ROAD, BUILDING, TREE, CAR, PERSON = range(6)
WALL, FLOOR, WINDOW, TABLE, CHAIR, LAMP = range(6)

_SEED = 2


def _palette(colors: str) -> list[Color]:
    return [tuple(bytes.fromhex(color)) for color in colors.split()]


_SKIES = [_palette(pair) for pair in ("588ed6 c4dcf0", "969ea8 d0d2d4", "685c96 f4b280", "3a4a78 a896ac")]
"""Top and bottom."""
_ASPHALTS = _palette("606268 807c78 70625a 484c56 969088")
_FACADES = _palette("a85444 ceb894 8c929a 7a846e c4945c 606e8a ded8ce")
_LEAVES = _palette("48763a 708c42 b86c30 aa4a34 38584a cea046")
_PAINTS = _palette("b83c36 345496 dedad2 2e3038 e2b23e 56845c 94969e 805282")
_GLASSES = _palette("3e4a60 96b0cc ecce82")
_SKINS = _palette("ecc6a8 ce9c76 96684c 624434")
_WALLS = _palette("ded0b4 a4b8a4 96acc4 c68a70 b8b4b2")
_WOODS = _palette("aa7448 cea470 704a34 8c8680")
_FABRICS = _palette("b0483c 46688c c49e48 5e7a58 aa7448 704a34 d2cec8")
_SHADES = _palette("fae8b0 f2f0e8 ce5c44 ecba54")
_LIT = (250, 210, 120)
_EVENINGS = ((0.50, 0.30, 0.15), (0.14, 0.18, 0.34), (0.25, 0.25, 0.22))
"""Light that is left at night, as shares of red, green and blue."""
# Strength of the coarse and of the fine grain of each class.
_STREET_GRAIN = ((0.02, 0.00), (0.06, 0.06), (0.05, 0.03), (0.14, 0.14), (0.02, 0.00), (0.05, 0.03))
_ROOM_GRAIN = ((0.025, 0.02), (0.06, 0.06), (0.03, 0.00), (0.04, 0.03), (0.05, 0.05), (0.02, 0.00))


def render_toy(name: str, folder: Path) -> None:
    """Draw the toy domain `name` as a raw tree: images/<split>/<stem>.jpg and masks/<split>/<stem>.png, 8-bit raw ids.

    Each picture depends on its name, split and index only, and each file appears whole; existing pairs stay. Raises
    UserError for a name that is not in CLASSES.
    """
    if name not in CLASSES:
        raise UserError(
            f'The layout `toy` can draw {" and ".join(CLASSES)}, not "{name}". For your own images and masks: `folder`.'
        )
    for split_number, (split, count) in enumerate(SPLITS.items()):
        images, masks = folder / "images" / split, folder / "masks" / split
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image_path, mask_path = images / f"{split}_{index:03d}.jpg", masks / f"{split}_{index:03d}.png"
            if image_path.exists() and mask_path.exists():
                continue
            rng = np.random.default_rng([_SEED, list(CLASSES).index(name), split_number, index])
            image, mask = _street(rng) if name == "toy_street" else _room(rng)
            with replacing(image_path, durable=False) as temporary:
                image.save(temporary, "JPEG", quality=95)
            with replacing(mask_path, durable=False) as temporary:
                mask.save(temporary, "PNG")


_Thing = tuple[float, float, Callable[[Scene, float, float], None]]
"""(z, x, how to paint it at x, z)."""


def _street(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    top, bottom = np.asarray(_SKIES[rng.integers(len(_SKIES))]) + rng.normal(0, 8, (2, 3))
    scene = Scene(
        rng,
        eye=rng.uniform(1.5, 2.6),
        horizon=rng.uniform(0.38, 0.58),
        behind=(top, bottom),
        night=rng.uniform() ** 0.8,
        dark=(0.12, 0.16, 0.30),
        sight=math.exp(rng.uniform(math.log(8), math.log(100))),
    )
    for x, y in rng.uniform((-8, 2), (8, 7), (rng.integers(6), 2)):
        for _ in range(6):
            center = (x + rng.normal(0, 0.8), y + rng.normal(0, 0.12), 12)
            scene.disc(SKY, tuple(bottom), center, rng.uniform(0.3, 0.7), squash=0.5, tone=1.06)
    side, asphalt, pavement = rng.uniform(5, 8), scene.near(_ASPHALTS), rng.uniform(1.1, 1.35)
    scene.lying(ROAD, asphalt, (-400, 400), 0, (1, 300))
    for sign in (-1, 1):
        scene.lying(ROAD, asphalt, (sign * (side - 2), sign * (side + 9)), 0, (1, 300), pavement)
    for z in range(3, 60, 5):
        scene.lying(ROAD, (226, 222, 206), (-0.12, 0.12), 0, (z, z + 2.4))
    for sign in (-1, 1):
        _paint_houses(scene, sign, side)
    wall, edge = math.copysign(side, scene.lean), rng.uniform(-side, side)
    if rng.random() < 0.7:
        scene.shine(rng.uniform(0.55, 0.75), [(edge, 0, 1), (edge, 0, 80), (wall, 0, 80), (wall, 0, 1)])
    things: list[_Thing] = []
    for _ in range(rng.integers(1, 5)):
        things.append((rng.uniform(8, 24), rng.choice((-1, 1)) * (side - rng.uniform(0.2, 1.6)), _paint_tree))
    for _ in range(rng.integers(1, 4)):
        things.append((rng.uniform(6, 17), rng.choice((-1, 1)) * rng.uniform(1.2, side - 2.6), _paint_car))
    for _ in range(rng.integers(0, 4)):
        things.append((rng.uniform(4, 9), rng.uniform(-3, 3), _paint_person))
    for distance, x, paint in sorted(things, key=itemgetter(0), reverse=True):
        paint(scene, x, distance)
    return scene.develop(_STREET_GRAIN)


def _paint_houses(scene: Scene, sign: int, side: float) -> None:
    """The houses along one side of the street, with gaps."""
    rng, far = scene.rng, 62.0
    while far > 3:
        near, height = max(far - rng.uniform(7, 14), 1.5), 3.2 * rng.integers(1, 6) + rng.uniform(0.5, 2)
        if rng.random() < 0.8:
            facade, pane = scene.near(_FACADES), scene.near(_GLASSES)
            scene.facing(BUILDING, facade, (sign * side, sign * (side + 12)), (0, height), near)
            scene.receding(BUILDING, facade, sign * side, (0, height), (near, far), 0.78)
            for floor in np.arange(0.9, height - 2, 3.2):
                for x in np.arange(side + 0.8, side + 10, 2.6):
                    lit = scene.lit(0.4)
                    window, span = _LIT if lit else pane, (sign * x, sign * (x + 1.3))
                    scene.facing(BUILDING, window, span, (floor, floor + 1.6), near, shines=lit)
                for z in np.arange(near + 0.8, far - 1.6, 2.6):
                    lit = scene.lit(0.4)
                    window, span = _LIT if lit else pane, (z, z + 1.3)
                    scene.receding(BUILDING, window, sign * side, (floor, floor + 1.6), span, 0.85, shines=lit)
        far = near


def _paint_tree(scene: Scene, x: float, z: float) -> None:
    rng, leaves = scene.rng, scene.near(_LEAVES)
    trunk, crown = rng.uniform(1.5, 2.6), rng.uniform(1.3, 2.3)
    scene.shadow((x - crown, x + crown), (z, z + 1))
    scene.facing(TREE, (92, 70, 54), (x - 0.2, x + 0.2), (0, trunk + crown), z)
    if rng.random() < 0.25:
        for level in range(3):
            half, foot = crown * (1 - 0.25 * level), 0.5 * trunk + 0.8 * crown * level
            triangle = [(x - half, foot, z), (x + half, foot, z), (x, foot + 1.7 * crown, z)]
            scene.polygon(TREE, leaves, triangle, 0.85 + 0.12 * level)
        return
    for lift in np.linspace(-0.5, 0.9, 14):
        center = (x + rng.normal(0, 0.45) * crown, trunk + crown * (1 + 0.8 * lift), z)
        scene.disc(TREE, leaves, center, crown * rng.uniform(0.4, 0.65), tone=1 + 0.3 * lift + rng.normal(0, 0.06))


def _paint_car(scene: Scene, x: float, z: float) -> None:
    paint, glass, tyre = scene.near(_PAINTS), scene.near(_GLASSES[:2]), (34, 34, 38)
    seen_from_side = scene.rng.random() < 0.35
    half, length, inset, high = (2.0, 1.8, 0.55, 0.9) if seen_from_side else (0.9, 4.0, 0.08, 0.95)
    cabin = ((x - half + inset, x + half - inset), (z + 0.1, z + 1.7) if seen_from_side else (z + 1, z + 3.4))
    scene.shadow((x - half, x + half), (z, z + length))
    for wheel in (x - 0.65 * half, x + 0.65 * half):
        scene.box(CAR, tyre, (wheel - 0.17, wheel + 0.17), (0, 0.4), (z + 0.1, z + 0.6))
    scene.box(CAR, paint, (x - half, x + half), (0.28, high), (z, z + length))
    scene.box(CAR, glass, cabin[0], (high, high + 0.6), cabin[1])
    scene.box(CAR, paint, cabin[0], (high + 0.5, high + 0.6), cabin[1])
    light = ((252, 240, 200), (200, 40, 36))[scene.rng.integers(2)]
    for sign in (-1, 1):
        if seen_from_side:
            scene.disc(CAR, tyre, (x + sign * 1.25, 0.36, z), 0.36)
            scene.disc(CAR, (170, 172, 176), (x + sign * 1.25, 0.36, z), 0.16)
        else:
            scene.facing(CAR, light, (x + sign * 0.5, x + sign * 0.8), (0.6, 0.8), z, shines=scene.night > 0.4)


def _paint_person(scene: Scene, x: float, z: float) -> None:
    rng, shirt, trousers = scene.rng, scene.near(_PAINTS), scene.near(_PAINTS)
    hip, neck = np.array((0.85, 1.5)) * rng.uniform(0.9, 1.1)
    stride, reach = rng.uniform(0.08, 0.25), rng.uniform(0.34, 0.55, size=2)
    scene.shadow((x - 0.3, x + 0.3), (z, z + 0.3))
    for sign, hand in zip((-1, 1), reach, strict=True):
        foot, inner, outer = x + sign * stride, x + sign * (hand - 0.1), x + sign * (hand + 0.1)
        leg = [(foot - 0.13, 0, z), (foot + 0.13, 0, z), (x + 0.25, hip, z), (x - 0.25, hip, z)]
        arm = [(x, neck, z), (x + sign * 0.36, neck, z), (outer, hip, z), (inner, hip, z)]
        scene.polygon(PERSON, trousers, leg, 1 - 0.08 * sign)
        scene.polygon(PERSON, shirt, arm, 0.85)
    scene.polygon(PERSON, shirt, [(x - 0.25, hip, z), (x + 0.25, hip, z), (x + 0.33, neck, z), (x - 0.33, neck, z)])
    scene.disc(PERSON, scene.near(((52, 40, 34), (120, 84, 52), (196, 160, 96))), (x, neck + 0.25, z), 0.21)
    scene.disc(PERSON, scene.near(_SKINS), (x, neck + 0.16, z), 0.18)


def _room(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    color = np.asarray(_WALLS[rng.integers(len(_WALLS))]) * rng.uniform(0.85, 1.1) + rng.normal(0, 8, 3)
    scene = Scene(
        rng,
        eye=rng.uniform(1.3, 1.9),
        horizon=rng.uniform(0.16, 0.36),
        behind=(color, color),
        night=rng.uniform() ** 0.8,
        dark=_EVENINGS[rng.integers(len(_EVENINGS))],
    )
    left, right = -rng.uniform(1.9, 3.2), rng.uniform(1.9, 3.2)
    depth, height = rng.uniform(4.0, 5.6), rng.uniform(2.4, 2.9)
    scene.lying(WALL, (236, 234, 228), (left, right), height, (0.5, depth))
    for x, tone in zip((left, right), rng.permutation((0.8, 1.06)), strict=True):
        scene.receding(WALL, tuple(color), x, (0, height), (0.5, depth), tone)
    scene.facing(WALL, tuple(color), (left, right), (0, height), depth, 0.94)
    _paint_floor(scene, (left, right), depth)
    _paint_openings(scene, (left, right), depth)
    table, middle = rng.uniform(2.4, depth - 1.2), rng.uniform(left + 1.1, right - 1.1)
    things: list[_Thing] = [(table, middle, _paint_table)] if rng.random() < 0.85 else []
    seats = (middle + rng.choice((-1, 1), 3) * rng.uniform(0.8, 1.6, 3)).clip(left + 0.35, right - 0.35)
    for x in seats[: rng.integers(1, 4)]:
        things.append((table + rng.uniform(-0.5, 0.9), x, _paint_chair))
    for _ in range(rng.integers(1, 3)):
        things.append((rng.uniform(2.8, depth - 0.4), rng.uniform(left + 0.4, right - 0.4), _paint_lamp))
    for distance, x, paint in sorted(things, key=itemgetter(0), reverse=True):
        paint(scene, x, distance)
    return scene.develop(_ROOM_GRAIN)


def _paint_floor(scene: Scene, x: Span, depth: float) -> None:
    """Boards, tiles or carpet, and perhaps a rug."""
    rng, ground, kind = scene.rng, scene.near(_WOODS), scene.rng.integers(3)
    width, length = ((0.3, 9.0), (0.5, 0.5), (9.0, 9.0))[kind]
    for column, start in enumerate(np.arange(x[0], x[1], width)):
        for row, z in enumerate(np.arange(0.5, depth, length)):
            tone = (0.9, 1.06)[(row + column) % 2] + rng.normal(0, 0.03)
            scene.lying(FLOOR, ground, (start, min(start + width, x[1])), 0, (z, min(z + length, depth)), tone)
    if rng.random() < 0.5:
        rug, middle, near = scene.near(_FABRICS), rng.uniform(-0.6, 0.6), rng.uniform(2, 3)
        scene.lying(FLOOR, rug, (middle - 1.2, middle + 1.2), 0, (near, near + 1.6))
        scene.lying(FLOOR, rug, (middle - 1.0, middle + 1.0), 0, (near + 0.15, near + 1.45), 1.15)


def _paint_openings(scene: Scene, x: Span, depth: float) -> None:
    """One or two windows, their daylight on the floor, and perhaps a picture, which counts as wall."""
    rng, frame = scene.rng, scene.near(((240, 238, 232), (112, 74, 52), (90, 92, 96)))
    top, bottom = np.asarray(_SKIES[rng.integers(len(_SKIES))]) * rng.choice((0.35, 1.0, 1.05))
    low, high = rng.uniform(0.7, 1.0), rng.uniform(1.8, 2.2)
    starts = np.linspace(x[0] + 0.4, x[1] - 1.4, 3) + rng.uniform(-0.2, 0.2)
    kinds = rng.permutation(("window", rng.choice(("window", "nothing")), "picture"))
    for start, kind in zip(starts, kinds, strict=True):
        if kind == "picture":
            scene.facing(WALL, scene.near(_FABRICS), (start + 0.2, start + 0.8), (1.3, 1.9), depth)
            scene.facing(WALL, scene.near(_WALLS), (start + 0.27, start + 0.73), (1.37, 1.83), depth)
        elif kind == "window":
            scene.facing(WINDOW, frame, (start, start + 1.1), (low, high), depth)
            pane_height = (high - low) / 2 - 0.1
            for pane in (start + 0.07, start + 0.58):
                for sill, color in ((low + 0.07, bottom), ((low + high) / 2 + 0.02, top)):
                    scene.facing(WINDOW, tuple(color), (pane, pane + 0.45), (sill, sill + pane_height), depth)
            end, lean = start + 1.1, scene.lean / 2
            far, near = depth - 0.7, depth - 1.8
            scene.shine(1.3, [(start, 0, far), (end, 0, far), (end + lean, 0, near), (start + lean, 0, near)])


def _paint_table(scene: Scene, x: float, z: float) -> None:
    rng, wood = scene.rng, scene.near(_WOODS)
    half, deep, high = rng.uniform(0.55, 0.95), rng.uniform(0.6, 0.9), rng.uniform(0.65, 0.8)
    scene.shadow((x - half, x + half), (z, z + deep - 0.8))
    scene.legs(TABLE, wood, (x - half, x + half), high, (z, z + deep))
    scene.box(TABLE, wood, (x - half, x + half), (high - 0.15, high), (z, z + deep))


def _paint_chair(scene: Scene, x: float, z: float) -> None:
    rng, fabric = scene.rng, scene.near(_FABRICS)
    wood = fabric if rng.random() < 0.5 else scene.near(_WOODS)
    half, high = rng.uniform(0.24, 0.31), rng.uniform(0.9, 1.15)
    back_is_near = rng.random() < 0.4
    scene.shadow((x - half, x + half), (z, z - 0.5))
    scene.legs(CHAIR, wood, (x - half, x + half), 0.45, (z, z + 2 * half))
    rest = z if back_is_near else z + 2 * half - 0.07
    scene.box(CHAIR, fabric, (x - half, x + half), (0.4, 0.48), (z, z + 2 * half))
    scene.box(CHAIR, fabric, (x - half, x + half), (0.45 if back_is_near else 0.52, high), (rest, rest + 0.07))


def _paint_lamp(scene: Scene, x: float, z: float) -> None:
    """A lamp that hangs from the ceiling, or one on a stand."""
    rng, shade, metal = scene.rng, scene.near(_SHADES), scene.near(((60, 58, 60), (180, 150, 90)))
    hangs, bottom, high = rng.random() < 0.5, rng.uniform(0.24, 0.34), rng.uniform(0.3, 0.45)
    y, top = rng.uniform(1.5, 1.9) if hangs else rng.uniform(1.2, 1.6), bottom * rng.uniform(0.35, 0.9)
    if not hangs:
        scene.disc(LAMP, metal, (x, 0.03, z), 0.17, squash=0.3)
    scene.facing(LAMP, metal, (x - 0.05, x + 0.05), (y, 3.5) if hangs else (0, y), z)
    outline = [(x - bottom, y, z), (x + bottom, y, z), (x + top, y + high, z), (x - top, y + high, z)]
    scene.polygon(LAMP, shade, outline, shines=scene.lit(0.7))
    scene.disc(LAMP, shade, (x, y, z), bottom, squash=0.2, tone=1.15)
