"""How fast `pack` is, beside one process that decodes, resizes and encodes the same files with Pillow in a plain loop.

python benchmarks/pack.py [--images 1000] [--workers N] [--repeats 3] [--json]

Draws photographs of 1280x960 with masks, stored by both at 640x480. The two take turns; medians are compared.
Efficiency is pack's rate / (workers x the plain rate).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from photographs import draw
from PIL import Image
from rich.console import Console
from rich.table import Table

from multidomain_cct.data.domain import Domain, LabelClass, Split

SIZE, STORED = (1280, 960), (640, 480)
COLORS = np.random.default_rng(1).integers(0, 255, (8, 3))
DOMAIN = Domain(
    name="drawn",
    layout="folder",
    splits={"train": Split("images/*.jpg", "masks/*.png")},
    classes=tuple(LabelClass(f"class {n}", tuple(int(v) for v in color)) for n, color in enumerate(COLORS)),
    size=STORED,
)


def plain_loop(raw: Path) -> None:
    """What a user would write: read, resize, encode, one after the other."""
    for path in sorted((raw / "images").iterdir()):
        image = Image.open(path).convert("RGB").resize(STORED, Image.Resampling.BICUBIC)
        mask = Image.open(raw / "masks" / f"{path.stem}.png").resize(STORED, Image.Resampling.NEAREST)
        image.save(io.BytesIO(), "JPEG", quality=95)
        mask.save(io.BytesIO(), "PNG")


def seconds(run: object, *arguments: object, **options: object) -> float:
    started = time.perf_counter()
    run(*arguments, **options)  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # Not at the top: pack's workers import this file anew, as they do the command's, and need none of what writing
    # shards needs.
    from multidomain_cct.data.packing.pack import pack

    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder) / "raw", Path(folder) / "out"
        draw(raw, options.images, SIZE, colors=COLORS, regions=(12, 16), grain=12, ending="jpg", quality=90)
        plain, packed = [], []
        for _ in range(options.repeats):
            plain.append(options.images / seconds(plain_loop, raw))
            packed.append(options.images / seconds(pack, DOMAIN, raw, "train", out, workers=options.workers))
            shutil.rmtree(out)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "images": options.images,
        "workers": options.workers,
        "plain_images_per_s": statistics.median(plain),
        "pack_images_per_s": statistics.median(packed),
        "efficiency": statistics.median(p / (options.workers * q) for p, q in zip(packed, plain, strict=True)),
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    table = Table(
        title=f"pack, {options.images} images of {SIZE[0]}x{SIZE[1]} to {STORED[0]}x{STORED[1]}, {result['date']}, "
        f"{result['machine']}"
    )
    for column in ("plain loop, images/s", f"pack, {options.workers} workers, images/s", "pack / (workers x plain)"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{result['plain_images_per_s']:.1f}", f"{result['pack_images_per_s']:.1f}", f"{result['efficiency']:.2f}"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
