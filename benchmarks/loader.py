"""How fast training views are made, beside bare decoding by the same library and beside a plain Dataset, and how long
training waits for them.

python benchmarks/loader.py [--images 8] [--views 32] [--size 2048x1024] [--crop 512] [--repeats 5] [--steps 40]
                            [--json]

Draws photographs of 2048x1024 with masks (PNG; as JPEG of quality 95 about 0.8 MB), packs them twice, at 1024x512 as
domains/cityscapes.yaml stores them and at their original size, and makes the same views of both: a crop of what
1024x512 is at a random scale of 0.5 to 2.

- loader: everything to the finished batch, in one worker process that has started: of images without masks, of which
  half have masks, and with masks.
- bare: Pillow decodes the JPEGs of those very views, and torchvision resizes regions as large as the views' to the
  crop, as in the loader. No masks, checks, flips, padding, batches.
- Pillow: the same, but Pillow resizes too, and no tensor is made.
- plain: a usual torch Dataset over the folder of PNGs, in one worker process too: open, convert, resize all of it,
  crop, flip, to tensors; every image with its mask.

They take turns; medians are compared. Where a view's time goes is measured in one process, on images without masks:
reading and checking their bytes, with that the views, with that the batches; beside them what a worker process takes
for all of it.

Waiting is read from the metrics of a short training on drawn images of 320x240 with one worker, two domains as in
recipes/real_small.yaml.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from photographs import draw
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.transforms.v2 import functional as F

from multidomain_cct.data.batches.loader import TrainingSet, steps
from multidomain_cct.data.batches.streams import DataSettings, DomainSettings, DomainStreams, open_streams
from multidomain_cct.data.batches.views import Augment, image_tensor, training_view
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.packing.pack import pack
from multidomain_cct.data.shards.reader import Record, Shards
from multidomain_cct.files.seeds import seed_from
from multidomain_cct.training.runlog import read_metrics

SCALE = (0.5, 2.0)
"""On half the original size, whatever is stored."""
COLORS = np.random.default_rng(1).integers(20, 236, (19, 3))
DOMAIN = Domain(
    name="drawn",
    layout="folder",
    splits={"train": Split("images/*.png", "masks/*.png")},
    classes=tuple(LabelClass(f"class {n}", tuple(int(v) for v in color), ids=(n,)) for n, color in enumerate(COLORS)),
)
BATCH = 4
STARTED = 3
"""Batches after which a worker process is taken to have started."""
BUDGETS = {"without_masks": ("none", "all"), "half_with_masks": ("1/2", "rest"), "with_masks": ("all", "none")}
"""By name of the figure, which images are labelled and which are not."""
MASKS = {"without_masks": "none", "half_with_masks": "half", "with_masks": "all"}
"""By name of the figure, which images have masks."""
LOOK: dict[str, Any] = {"colors": COLORS, "regions": (16, 32), "grain": 6, "ending": "png", "compress_level": 1}


class PlainDataset(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What a user would write."""

    def __init__(self, root: Path, size: tuple[int, int], crop: int) -> None:
        self.images, self.masks, self.size, self.crop = (
            sorted((root / "images").iterdir()),
            sorted((root / "masks").iterdir()),
            size,
            crop,
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = Image.open(self.images[number]).convert("RGB"), Image.open(self.masks[number])
        factor = random.uniform(*SCALE) / 2
        width, height = round(self.size[0] * factor), round(self.size[1] * factor)
        image, mask = (
            image.resize((width, height), Image.Resampling.BILINEAR),
            mask.resize((width, height), Image.Resampling.NEAREST),
        )
        left, top = random.randint(0, max(0, width - self.crop)), random.randint(0, max(0, height - self.crop))
        box = (left, top, left + self.crop, top + self.crop)
        # Beyond the image, Pillow fills with 0; a user would pad before.
        image, mask = image.crop(box), mask.crop(box)
        if random.random() < 0.5:
            image, mask = (
                image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
                mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            )
        return F.pil_to_tensor(image), F.pil_to_tensor(mask)[0]


def plain_rate(raw: Path, size: tuple[int, int], crop: int, views: int) -> float:
    data, count = PlainDataset(raw, size, crop), max(2, views // BATCH)
    numbers = [[(batch * BATCH + n) % len(data) for n in range(BATCH)] for batch in range(STARTED + count)]
    batches = iter(torch.utils.data.DataLoader(data, batch_sampler=numbers, num_workers=1))
    for _ in range(STARTED):
        next(batches)
    return rate(batches, count, BATCH)


def rate(batches: Iterator[Any], count: int, images: float) -> float:
    """Images per second of wall time."""
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * images / (time.perf_counter() - started)


Views = list[tuple[bytes, float]]
"""JPEGs, and the factors of their sizes at which they are shown."""


def bare_rate(views: Views, crop: int) -> float:
    """Images per second."""
    started = time.perf_counter()
    for content, factor in views:
        image = Image.open(io.BytesIO(content))
        region, shown = sizes(image, factor, crop)
        F.resize(image_tensor(image.crop((0, 0, *region))), list(shown[::-1]), antialias=True)
    return len(views) / (time.perf_counter() - started)


def pillow_rate(views: Views, crop: int) -> float:
    """Images per second."""
    started = time.perf_counter()
    for content, factor in views:
        image = Image.open(io.BytesIO(content))
        region, shown = sizes(image, factor, crop)
        image.resize(shown, Image.Resampling.BILINEAR, box=(0, 0, *region))
    return len(views) / (time.perf_counter() - started)


def sizes(image: Image.Image, factor: float, crop: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of what is shown at this factor: in the image, and in the view."""
    region = min(image.width, round(crop / factor)), min(image.height, round(crop / factor))
    return region, (min(crop, round(region[0] * factor)), min(crop, round(region[1] * factor)))


class Ours:
    """The loader on the shards of one stored size."""

    def __init__(self, shards: Path, domain: Domain, crop: int, views: int) -> None:
        self.scale = SCALE if domain.size is not None else (SCALE[0] / 2, SCALE[1] / 2)
        self.shards, self.domain, self.crop, self.views = shards, domain, crop, views

    def streams(self, labelled: str, unlabelled: str) -> DomainStreams:
        batch = {"labelled_batch": BATCH, "unlabelled_batch": BATCH}
        settings = DataSettings(shards=str(self.shards), crop=[self.crop, self.crop], **batch)
        return open_streams(self.domain, DomainSettings(labelled=labelled, unlabelled=unlabelled), settings)

    def data(self, streams: DomainStreams) -> TrainingSet:
        return TrainingSet([streams], seed=0, augment=Augment(scale=list(self.scale)))

    def rates(self, labelled: str, unlabelled: str) -> dict[str, float]:
        """Images per second of one worker process once it has started, with nothing prepared, and of bare work on the
        same images at the same scales.
        """
        streams = self.streams(labelled, unlabelled)
        per_step = BATCH * (bool(streams.labelled) + bool(streams.unlabelled))
        count = max(2, self.views // per_step)
        views = [(record.image, factor) for record, _, factor in self.shown(streams, range(STARTED, STARTED + count))]
        batches = steps(self.data(streams), 0, STARTED + count, workers=1)
        for _ in range(STARTED):
            next(batches)
        return {
            "loader": rate(batches, count, per_step),
            "bare": bare_rate(views, self.crop),
            "pillow": pillow_rate(views, self.crop),
        }

    def stages(self) -> dict[str, float]:
        """Milliseconds a view, of images without masks, up to the end of each stage; and of bare work, and from a
        worker process.
        """
        streams = self.streams("none", "all")
        data, numbers = self.data(streams), range(max(2, self.views // BATCH))
        shown, found = self.shown(streams, numbers), {}
        views = [(record.image, factor) for record, _, factor in shown]

        def view(record: Record, seed: int) -> None:
            training_view(record, self.domain, data.augment, (self.crop, self.crop), np.random.default_rng(seed))

        def per_view(act: Callable[[], object]) -> float:
            started = time.perf_counter()
            act()
            return 1000 * (time.perf_counter() - started) / len(shown)

        found["read"] = per_view(lambda: self.shown(streams, numbers))
        found["views"] = found["read"] + per_view(lambda: [view(record, seed) for record, seed, _ in shown])
        found["batches"] = per_view(lambda: [data[number] for number in numbers])
        return found | {
            "bare": 1000 / bare_rate(views, self.crop),
            "worker": 1000 / self.rates("none", "all")["loader"],
        }

    def shown(self, streams: DomainStreams, numbers: range) -> list[tuple[Record, int, float]]:
        """The record, the seed and the scale of each view in these steps."""
        found = []
        for kind in ("labelled", "unlabelled"):
            samples = getattr(streams, kind)
            for position in range(numbers.start * BATCH, numbers.stop * BATCH) if len(samples) else ():
                epoch, chosen = streams.order(kind, 0).at(position)
                source, number = samples[chosen]
                record = streams.sources[source].read(number, with_mask=False)
                seed = seed_from(0, self.domain.name, epoch, record.key, kind)
                found.append((record, seed, float(np.random.default_rng(seed).uniform(*self.scale))))
        return found


def measure_rates(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    raw, width, height = folder / "raw", *(int(side) for side in options.size.split("x"))
    draw(raw, options.images, (width, height), **LOOK)
    stored = {
        f"{width // 2}x{height // 2}": replace(DOMAIN, name="half", size=(width // 2, height // 2)),
        options.size: DOMAIN,
    }
    rows = {}
    for size, domain in stored.items():
        pack(domain, raw, "train", folder / "shards", workers=2)
        ours = Ours(folder / "shards", domain, options.crop, options.views)
        found: list[dict[str, float]] = []
        stages: list[dict[str, float]] = []
        for _ in range(options.repeats):
            figures = {"plain": plain_rate(raw, (width, height), options.crop, min(options.views, 4 * BATCH))}
            for name, budget in BUDGETS.items():
                figures |= {name if who == "loader" else f"{who}_{name}": of for who, of in ours.rates(*budget).items()}
            found.append(figures)
            stages.append(ours.stages())
        row = {f"{name}_images_per_s": statistics.median(repeat[name] for repeat in found) for name in found[0]}
        for name in BUDGETS:
            peers = {"bare": f"bare_{name}", "pillow": f"pillow_{name}", "plain": "plain"}
            row |= {
                f"{name}_over_{peer}": statistics.median(repeat[name] / repeat[own] for repeat in found)
                for peer, own in peers.items()
            }
        row["stages_ms"] = {name: statistics.median(repeat[name] for repeat in stages) for name in stages[0]}
        opened = Shards.open(folder / "shards" / domain.name, "train")
        records = [opened.read(number) for number in range(options.images)]
        row["jpeg_kb"] = statistics.mean(len(record.image) for record in records) / 1024
        stored_masks = [record.mask for record in records if record.mask is not None]
        row["masks"] = {
            "stored": reading(stored_masks),
            "pillow": reading([as_pillow_writes(mask) for mask in stored_masks]),
        }
        rows[size] = row
    return rows


def as_pillow_writes(mask: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(mask)).save(buffer, "PNG")
    return buffer.getvalue()


def reading(masks: list[bytes]) -> dict[str, float]:
    """Size of a PNG, and the time that Pillow takes to read it."""
    taken = []
    for mask in masks * 10:
        started = time.perf_counter()
        Image.open(io.BytesIO(mask)).load()
        taken.append(time.perf_counter() - started)
    return {"ms": 1000 * statistics.median(taken), "kb": statistics.mean(map(len, masks)) / 1024}


def measure_waiting(steps_: int, folder: Path) -> dict[str, float]:
    """Of a short training, without its first ten steps, in which the worker starts."""
    recipe = yaml.safe_load(Path(__file__).parents[1].joinpath("recipes/real_small.yaml").read_text(encoding="utf-8"))
    (folder / "domains").mkdir(parents=True)
    for name in recipe["domains"]:
        domain = replace(DOMAIN, name=name)
        draw(folder / name, 24, (320, 240), **LOOK)
        pack(domain, folder / name, "train", folder / "shards", workers=1)
        (folder / "domains" / f"{name}.yaml").write_text(domain.to_yaml(), encoding="utf-8")
        recipe["domains"][name] = {"labelled": 10, "val_split": ""}
    recipe |= {
        "name": "short",
        "runs": str(folder / "runs"),
        "training": {"steps": steps_, "log_every": min(10, steps_)},
    }
    recipe["data"]["shards"] = str(folder / "shards")
    recipe["encoder"]["weights"] = "none"
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "multidomain_cct", str(path), "--domains", str(folder / "domains")]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"the short training failed: {finished.stderr.strip()}")
    lines = [line for line in read_metrics(folder / "runs/short/metrics.jsonl") if "sys/data_wait_fraction" in line]
    counted = [line for line in lines if line["step"] > 10] or lines
    return {
        "share": statistics.median(line["sys/data_wait_fraction"] for line in counted),
        "images_per_s": statistics.median(line["sys/images_per_s"] for line in counted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--views", type=int, default=32, help="that are timed at a time")
    parser.add_argument("--size", default="2048x1024", help="of the drawn images, WIDTHxHEIGHT")
    parser.add_argument("--crop", type=int, default=512, help="side in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of the training")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not re.fullmatch(r"[1-9]\d+x[1-9]\d+", options.size):
        parser.error(
            f"--size is {options.size!r}; it is WIDTHxHEIGHT in pixels, each 10 or more, for example 2048x1024."
        )
    for name in ("images", "views", "crop", "repeats", "steps"):
        if vars(options)[name] < 1:
            parser.error(f"--{name} is {vars(options)[name]}; it is at least 1.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_rates(options, Path(folder))
        waiting = measure_waiting(options.steps, Path(folder) / "training")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "images": options.images,
        "views": options.views,
        "size": options.size,
        "crop": options.crop,
        "stored": rows,
        "waiting": waiting,
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    table = Table(title=f"views of {options.crop}x{options.crop}, images/s, {result['date']}, {result['machine']}")
    for column in ("stored at", "masks", "loader", "bare", "Pillow", "plain", "loader / bare", "/ Pillow", "/ plain"):
        table.add_column(column, justify="right")
    for size, row in rows.items():
        for name in BUDGETS:
            rates = (f"{row[f'{key}_images_per_s']:.1f}" for key in (name, f"bare_{name}", f"pillow_{name}"))
            plain = f"{row['plain_images_per_s']:.1f}"
            table.add_row(
                size,
                MASKS[name],
                *rates,
                plain,
                *(f"{row[f'{name}_over_{peer}']:.2f}" for peer in ("bare", "pillow", "plain")),
            )
        table.add_section()
    Console().print(table)
    for size, row in rows.items():
        ms = row["stages_ms"]
        print(
            f"A view of {size}: {ms['read']:.2f} ms to read, {ms['views']:.2f} with the view (bare {ms['bare']:.2f}), "
            f"{ms['batches']:.2f} in a batch;"
            f" {ms['worker']:.2f} from a worker process."
        )
        stored, pillow = row["masks"]["stored"], row["masks"]["pillow"]
        print(
            f"Masks of {size}: {stored['ms']:.2f} ms to read ({stored['kb']:.1f} KB); as Pillow writes them "
            f"{pillow['ms']:.2f} ms ({pillow['kb']:.1f} KB)."
        )
    print(
        f"Training with one worker waits {waiting['share']:.2%} of its time for data, at "
        f"{waiting['images_per_s']:.1f} images/s."
    )


if __name__ == "__main__":
    main()
