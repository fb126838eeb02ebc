"""Drawn photographs whose files are as large as real ones': coloured regions, shading, grain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def draw(
    raw: Path,
    count: int,
    size: tuple[int, int],
    *,
    colors: np.ndarray,
    regions: tuple[int, int],
    grain: float,
    ending: str,
    **saving: Any,
) -> None:
    """`images/` and `masks/` of `count` photographs of size (width, height) under a new folder.

    Each region of the (rows, columns) has one of the (C, 3) colours, whose number its mask holds; `saving` goes to
    Pillow.
    """
    for folder in ("images", "masks"):
        (raw / folder).mkdir(parents=True)
    width, height = size
    for number in range(count):
        rng = np.random.default_rng(number)
        mask = Image.fromarray(rng.integers(0, len(colors), regions, dtype=np.uint8)).resize(
            size, Image.Resampling.NEAREST
        )
        pixels = colors[np.asarray(mask)] * np.linspace(0.6, 1.0, height)[:, None, None] + rng.normal(
            0, grain, (height, width, 3)
        )
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(raw / f"images/{number:04d}.{ending}", **saving)
        mask.save(raw / f"masks/{number:04d}.png")
