"""The painter of the toy domains: boxes, rectangles and discs seen through a random camera.

Coordinates are metres: x to the right, y up from the ground, z away from the camera. A Span is (from, to).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 128, 96
"""Of the finished picture, in pixels."""

Color = tuple[float, ...]
Point = tuple[float, float, float]
Span = tuple[float, float]

_OVERSAMPLING = 2
_SHINES = 255
"""In the layer of light: what is bright at night, too."""


class Scene:
    """A picture and its mask, painted from far to near over class 0, a gradient between the colours `behind`.

    `night` is 0 by day and 1 in the light `dark`; through air with `sight`, a distance fades by 1/e into the haze.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        *,
        eye: float,
        horizon: float,
        behind: tuple[np.ndarray, np.ndarray],
        night: float,
        dark: Color,
        sight: float = math.inf,
    ) -> None:
        self.rng, self.eye, self.night = rng, eye, night
        self.ambient = 1 - night * (1 - np.asarray(dark, dtype=np.float32))
        self.sight, self.haze = sight, tuple(behind[1])
        width, height = WIDTH * _OVERSAMPLING, HEIGHT * _OVERSAMPLING
        self.focal = width * rng.uniform(0.75, 1.0)
        self.center = (width * rng.uniform(0.38, 0.62), height * horizon)
        self.roll = math.radians(rng.uniform(-4, 4))
        self.lean = rng.uniform(-2.5, 2.5)
        fade = np.linspace(0, 1 / horizon, height).clip(0, 1)[:, None]
        rows = (behind[0] * (1 - fade) + behind[1] * fade).clip(0, 255).astype(np.uint8)
        self.color = Image.fromarray(np.repeat(rows[:, None], width, axis=1))
        self.label = Image.new("L", (width, height))
        # Light is painted like a colour (128 is neutral), so that a shadow does not darken objects in front of it.
        self.light = Image.new("L", (width, height), 128)
        layers = (self.color, self.label, self.light)
        self.color_pen, self.label_pen, self.light_pen = map(ImageDraw.Draw, layers)

    def near(self, palette: Sequence[Color]) -> Color:
        """A colour near one of the palette's."""
        chosen = np.asarray(palette[int(self.rng.integers(len(palette)))])
        return tuple(chosen * self.rng.uniform(0.85, 1.12) + self.rng.normal(0, 7, 3))

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        right, down = self.focal * x / z, self.focal * (self.eye - y) / z
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        return self.center[0] + cos * right - sin * down, self.center[1] + sin * right + cos * down

    def polygon(
        self, label: int, color: Color, points: Sequence[Point], tone: float = 1.0, *, shines: bool = False
    ) -> None:
        """Fill the outline with its label, its own or neutral light, and its colour times `tone`, which fades away."""
        clear = math.exp(-points[0][2] / self.sight)
        ink = tuple(
            int(min(max(c * tone, 0), 255) * clear + h * (1 - clear)) for c, h in zip(color, self.haze, strict=True)
        )
        outline = [self.project(*point) for point in points]
        self.color_pen.polygon(outline, fill=ink)
        self.label_pen.polygon(outline, fill=label)
        self.light_pen.polygon(outline, fill=_SHINES if shines else 128)

    def disc(
        self, label: int, color: Color, center: Point, radius: float, *, squash: float = 1.0, tone: float = 1.0
    ) -> None:
        x, y, z = center
        turns = np.linspace(0, 2 * math.pi, 20)
        outline = [(x + radius * math.cos(turn), y + radius * squash * math.sin(turn), z) for turn in turns]
        self.polygon(label, color, outline, tone)

    def facing(
        self, label: int, color: Color, x: Span, y: Span, z: float, tone: float = 1.0, *, shines: bool = False
    ) -> None:
        outline = [(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)]
        self.polygon(label, color, outline, tone, shines=shines)

    def lying(self, label: int, color: Color, x: Span, y: float, z: Span, tone: float = 1.0) -> None:
        self.polygon(label, color, [(x[0], y, z[0]), (x[1], y, z[0]), (x[1], y, z[1]), (x[0], y, z[1])], tone)

    def receding(
        self, label: int, color: Color, x: float, y: Span, z: Span, tone: float = 1.0, *, shines: bool = False
    ) -> None:
        outline = [(x, y[0], z[0]), (x, y[0], z[1]), (x, y[1], z[1]), (x, y[1], z[0])]
        self.polygon(label, color, outline, tone, shines=shines)

    def box(self, label: int, color: Color, x: Span, y: Span, z: Span) -> None:
        """The visible faces, each in its own tone."""
        if x[0] > 0 or x[1] < 0:
            self.receding(label, color, x[0] if x[0] > 0 else x[1], y, z, 0.72)
        if y[1] < self.eye:
            self.lying(label, color, x, y[1], z, 1.12)
        self.facing(label, color, x, y, z[0], 0.92)

    def legs(self, label: int, color: Color, x: Span, high: float, z: Span) -> None:
        """Four legs under the rectangle `x`, `z` at height `high`."""
        for back in (z[1] - 0.11, z[0]):
            for left in (x[0], x[1] - 0.11):
                self.box(label, color, (left, left + 0.11), (0, high), (back, back + 0.11))

    def shine(self, light: float, points: Sequence[Point]) -> None:
        """Light (above 1) or shadow (below 1) on everything painted so far."""
        self.light_pen.polygon([self.project(*point) for point in points], fill=int(128 * light))

    def shadow(self, x: Span, z: Span) -> None:
        """The shadow on the ground of an object with this base."""
        lean, end = self.lean, z[1] + 1
        self.shine(0.55, [(x[0], 0, z[0]), (x[1], 0, z[0]), (x[1] + lean, 0, end), (x[0] + lean, 0, end)])

    def lit(self, share: float) -> bool:
        """Whether one of the lamps is on of which, at night, `share` are."""
        return bool(self.rng.random() < share * (self.night - 0.3) / 0.7)

    def develop(self, grain: Sequence[tuple[float, float]]) -> tuple[Image.Image, Image.Image]:
        """The RGB picture, with grain, uneven light, tint and noise added, and the mask."""
        rng, strength = self.rng, np.asarray(grain, dtype=np.float32)
        color = np.asarray(self.color.reduce(_OVERSAMPLING), dtype=np.float32)  # (H, W, 3)
        label = np.ascontiguousarray(np.asarray(self.label)[::_OVERSAMPLING, ::_OVERSAMPLING])  # (H, W)
        shines = self.light.point([0] * _SHINES + [255]).reduce(_OVERSAMPLING)
        glow = np.asarray(shines, dtype=np.float32)[..., None] / 255
        halo = np.asarray(shines.filter(ImageFilter.GaussianBlur(7)), dtype=np.float32)[..., None] / 255
        shade = self.light.point([*range(_SHINES), 128]).filter(ImageFilter.GaussianBlur(2)).reduce(_OVERSAMPLING)
        light = np.asarray(shade, dtype=np.float32) / 128
        blotches = Image.fromarray(rng.normal(size=(HEIGHT // 6, WIDTH // 6)).astype(np.float32))
        coarse = np.asarray(blotches.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        light = light * (1 + strength[label, 0] * coarse + strength[label, 1] * rng.normal(size=label.shape))
        slope = rng.uniform(-0.2, 0.2, size=2)
        light = light * (1 + slope[0] * np.linspace(-1, 1, HEIGHT)[:, None] + slope[1] * np.linspace(-1, 1, WIDTH))
        tint = rng.uniform(0.88, 1.15) * rng.uniform(0.93, 1.07, size=3)
        reached = light[..., None] * (self.ambient + (1 - self.ambient) * 0.6 * halo) * tint
        picture = color * np.maximum(reached, glow) + rng.normal(0, rng.uniform(2, 7), size=color.shape)
        return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), Image.fromarray(label)
