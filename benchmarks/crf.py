"""How long the dense random field takes for one image, and how near it comes to the mean field over all pairs of
pixels.

python benchmarks/crf.py [--image FILE] [--sizes 160x120 320x240 640x480] [--classes 12] [--threads 1] [--repeats 5]
[--json]

Times are medians over the repeats of the whole call: lattice and ten iterations. Without --image a drawn picture is
used: regions of a few colours, shading and grain. What decides the time is how many points the lattice has, so they are
printed; a photograph of much texture has more. Agreement is measured at 64x48, where the direct mean field in float64
is still quick.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from multidomain_cct.weak.crf import CrfSettings, DenseCrf

COMPARED = (64, 48)


def drawn_picture() -> Image.Image:
    """1280x960: coloured regions, a gradient, grain that a photograph of good light has."""
    rng = np.random.default_rng(0)
    colors = rng.integers(20, 236, (10, 3))
    regions = Image.fromarray(rng.integers(0, 10, (9, 12), dtype=np.uint8)).resize(
        (1280, 960), Image.Resampling.NEAREST
    )
    pixels = colors[np.asarray(regions)] * np.linspace(0.6, 1.0, 960)[:, None, None] + rng.normal(0, 12, (960, 1280, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def problem(picture: Image.Image, size: tuple[int, int], classes: int) -> tuple[Tensor, Tensor]:
    """(C, H, W) smooth uncertain probabilities and the (3, H, W) uint8 image."""
    image = torch.from_numpy(np.array(picture.resize(size))).permute(2, 0, 1).contiguous()
    coarse = torch.from_numpy(np.random.default_rng(1).normal(0, 1.5, (1, classes, 12, 16))).float()
    return F.interpolate(coarse, size=(size[1], size[0]), mode="bicubic", align_corners=False)[0].softmax(dim=0), image


def direct_mean_field(probabilities: Tensor, image: Tensor, settings: CrfSettings) -> Tensor:
    """Mean field over all pairs of pixels, in float64."""
    height, width = image.shape[1:]
    position = (
        torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1).T.double()
    )
    color = image.flatten(1).T.double()
    coupling = 0
    for weight, points in (
        (settings.smooth_weight, position / settings.smooth_position),
        (settings.color_weight, torch.cat([position / settings.color_position, color / settings.color_value], dim=1)),
    ):
        kernel = torch.exp(-0.5 * torch.cdist(points, points) ** 2)
        scale = kernel.sum(dim=1).rsqrt()
        coupling = coupling + weight * scale[:, None] * kernel * scale
    unary = probabilities.double().log().flatten(1)
    belief = unary.softmax(dim=0)
    for _ in range(settings.iterations):
        belief = (unary + belief @ coupling).softmax(dim=0)
    return belief.view_as(probabilities)


def time_of(probabilities: Tensor, image: Tensor, repeats: int) -> dict[str, Any]:
    settings, walls, processors, builds = CrfSettings(), [], [], []
    DenseCrf(image, settings)(probabilities)
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        field = DenseCrf(image, settings)
        builds.append(time.perf_counter() - wall)
        field(probabilities)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    assert field.appearance is not None
    medians = {"seconds": walls, "lattice_seconds": builds, "processor_seconds": processors}
    return {"lattice_points": field.appearance.num_points} | {
        name: round(statistics.median(values), 3) for name, values in medians.items()
    }


def agreement(picture: Image.Image) -> dict[str, float]:
    probabilities, image = problem(picture, COMPARED, classes=4)
    found, exact = (
        DenseCrf(image, CrfSettings())(probabilities),
        direct_mean_field(probabilities, image, CrfSettings()),
    )
    same = found.argmax(dim=0) == exact.argmax(dim=0)
    return {
        "same_labels": round(float(same.double().mean()), 4),
        "mean_difference": round(float((found - exact).abs().mean()), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["160x120", "320x240", "640x480"])
    parser.add_argument("--classes", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    picture = drawn_picture() if options.image is None else Image.open(options.image).convert("RGB")
    rows = []
    for text in options.sizes:
        width, height = (int(part) for part in text.split("x"))
        size = (width, height) if (width > height) == (picture.width > picture.height) else (height, width)
        rows.append(
            {"size": f"{size[0]}x{size[1]}", **time_of(*problem(picture, size, options.classes), options.repeats)}
        )
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": options.threads,
        "classes": options.classes,
        "iterations": CrfSettings().iterations,
        "times": rows,
        "agreement": agreement(picture),
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    table = Table(
        title=f"dense CRF, {options.classes} classes, {result['iterations']} iterations, {options.threads} thread(s), "
        f"{result['machine']}"
    )
    for column in ("size", "lattice points", "lattice, s", "in all, s", "processor, s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["size"],
            str(row["lattice_points"]),
            *(f"{row[name]:.3f}" for name in ("lattice_seconds", "seconds", "processor_seconds")),
        )
    console = Console()
    console.print(table)
    same = result["agreement"]
    console.print(
        f"beside the direct mean field at {COMPARED[0]}x{COMPARED[1]}: {100 * same['same_labels']:.2f} % of labels "
        "agree, probabilities differ by"
        f" {same['mean_difference']:.5f} on average"
    )


if __name__ == "__main__":
    main()
