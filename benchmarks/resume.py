"""How long a run that goes on waits for its first batch and its first step, at the start of a long run and near its
end, beside a plain DataLoader.

python benchmarks/resume.py [--samples 1000000] [--repeats 9] [--workers 1] [--json]

One epoch of many samples in batches of eight (names of 64 drawn images of 160x120), gone on with at 0 % and at 99 %.
Ours: the streams are opened and `steps` is asked for its first batch. Plain: a shuffled torch DataLoader over image
files with a seeded generator, of which `accelerate.skip_first_batches` skips what has been seen: it draws the order and
passes over the numbers, without loading. Both are timed from the call, with one worker process; a step is forward and
backward of the same small network, which is built before. They take turns; medians are compared.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import skip_first_batches
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multidomain_cct.data.batches.loader import TrainingSet, steps
from multidomain_cct.data.batches.streams import DataSettings, DomainSettings, open_streams
from multidomain_cct.data.batches.views import Augment
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.shards.writer import ShardWriter

SIZE, CROP, DRAWN, BATCH, CLASSES = (160, 120), 96, 64, 8, 8
DOMAIN = Domain(
    "drawn",
    "folder",
    {"train": Split("*.jpg", "*.png")},
    tuple(LabelClass(f"class {n}", (n, n, n)) for n in range(CLASSES)),
)


def draw(folder: Path) -> None:
    """The same images and masks as shards and as files."""
    (folder / "files").mkdir()
    with ShardWriter(folder / "shards" / DOMAIN.name, "train") as writer:
        for number in range(DRAWN):
            rng = np.random.default_rng(number)
            mask = Image.fromarray(rng.integers(0, CLASSES, (6, 8), dtype=np.uint8)).resize(
                SIZE, Image.Resampling.NEAREST
            )
            image, content = Image.merge("RGB", [mask.point(lambda value: 20 + 25 * value)] * 3), {}
            for name, picture, kind in (("image", image, "JPEG"), ("mask", mask, "PNG")):
                buffer = io.BytesIO()
                picture.save(buffer, kind)
                content[name] = buffer.getvalue()
                (folder / f"files/{number:03d}.{'jpg' if kind == 'JPEG' else 'png'}").write_bytes(content[name])
            writer.write(f"{number:03d}", image=content["image"], mask=content["mask"], meta=b"{}")


class PlainDataset(Dataset[tuple[Tensor, Tensor]]):
    """What a user would write; sample n is the file n % 64."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.images, self.masks, self.samples = (
            sorted((folder / "files").glob("*.jpg")),
            sorted((folder / "files").glob("*.png")),
            samples,
        )

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, mask = Image.open(self.images[number % DRAWN]).convert("RGB"), Image.open(self.masks[number % DRAWN])
        left, top = (int(torch.randint(side - CROP + 1, ())) for side in SIZE)
        box = (left, top, left + CROP, top + CROP)
        return torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1), torch.from_numpy(np.array(mask.crop(box)))


def first_of_ours(folder: Path, samples: int, start: int, workers: int) -> tuple[Tensor, Tensor]:
    settings = DataSettings(shards=str(folder / "shards"), labelled_batch=BATCH, crop=[CROP, CROP])
    opened = open_streams(DOMAIN, DomainSettings(unlabelled="none"), settings)
    streams = replace(opened, labelled=list(opened.labelled) * (samples // DRAWN))
    batch = next(steps(TrainingSet([streams], seed=0, augment=Augment()), start, samples // BATCH, workers=workers))[
        DOMAIN.name
    ]
    return batch.images, batch.masks


def first_of_plain(folder: Path, samples: int, start: int, workers: int) -> tuple[Tensor, Tensor]:
    data, generator = PlainDataset(folder, samples), torch.Generator().manual_seed(0)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, generator=generator, num_workers=workers)
    images, masks = next(iter(skip_first_batches(loader, start)))
    return images, masks


def small_network() -> torch.nn.Module:
    widths = (3, 16, 32, CLASSES)
    layers = [torch.nn.Conv2d(before, after, 3, padding=1) for before, after in zip(widths, widths[1:], strict=False)]
    return torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.ReLU())))


def timed(
    first: Callable[..., tuple[Tensor, Tensor]], network: torch.nn.Module, *arguments: object
) -> dict[str, float]:
    """Seconds from the call to the first batch, and to the end of the first step."""
    started = time.perf_counter()
    images, masks = first(*arguments)
    got = time.perf_counter() - started
    F.cross_entropy(network(images / 255), masks.long(), ignore_index=255).backward()
    return {"batch_s": got, "step_s": time.perf_counter() - started}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    entrants = {"ours": first_of_ours, "plain": first_of_plain}
    num_steps = options.samples // BATCH
    places = {"0 %": 0, "99 %": num_steps * 99 // 100}
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {place: [] for place in places} for name in entrants}
    network = small_network()
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        for repeat in range(options.repeats + 1):
            for place, start in places.items():
                for name in ("ours", "plain") if repeat % 2 else ("plain", "ours"):
                    taken = timed(entrants[name], network, Path(folder), options.samples, start, options.workers)
                    if repeat:
                        # The first of each fills caches.
                        found[name][place].append(taken)
    medians = {
        name: {
            place: {key: statistics.median(taken[key] for taken in many) for key in ("batch_s", "step_s")}
            for place, many in by_place.items()
        }
        for name, by_place in found.items()
    }
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "samples": options.samples,
        "workers": options.workers,
        "first": medians,
        "late_over_early": {
            name: statistics.median(
                late["batch_s"] / early["batch_s"]
                for early, late in zip(by_place["0 %"], by_place["99 %"], strict=True)
            )
            for name, by_place in found.items()
        },
        "plain_over_ours": {
            place: statistics.median(
                p["batch_s"] / o["batch_s"] for p, o in zip(found["plain"][place], found["ours"][place], strict=True)
            )
            for place in places
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help=f"at least {100 * DRAWN}")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.samples < 100 * DRAWN:
        parser.error(
            f"--samples is {options.samples}; it is at least {100 * DRAWN}, so that 99 % is another place than the end."
        )
    # Both cut the same number of samples into whole batches.
    options.samples -= options.samples % DRAWN
    torch.set_num_threads(1)
    result = measure(options)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    table = Table(title=f"going on in a run of {options.samples:,} samples, {result['date']}, {result['machine']}")
    for column in ("", "going on at", "first batch, s", "first step, s"):
        table.add_column(column, justify="right")
    for name, by_place in result["first"].items():
        for place, taken in by_place.items():
            table.add_row(name, place, f"{taken['batch_s']:.3f}", f"{taken['step_s']:.3f}")
    Console().print(table)
    print(
        f"99 % over 0 %: ours {result['late_over_early']['ours']:.2f}, plain {result['late_over_early']['plain']:.2f}"
    )
    print(f"plain over ours at 99 %: {result['plain_over_ours']['99 %']:.1f}")


if __name__ == "__main__":
    main()
