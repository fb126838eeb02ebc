"""How fast predictions are scored, beside torchmetrics and, from files, beside cityscapesScripts.

python benchmarks/evaluate.py [--images 100] [--size 2048x1024] [--classes 19] [--repeats 3] [--threads 1] [--json]

Scores stored predictions: train ids in 8 bits, ignored pixels in the truth. Ten different pairs are drawn and used in
turn. What is timed is everything from the pair in memory to the mean IoU; beside cityscapesScripts, which takes files,
from the PNG files. torchmetrics (MulticlassJaccardIndex) is timed as it comes and with `validate_args=False`. All must
count the same pixels, and the mean IoU of what they counted must agree to 1e-9; torchmetrics' own mean is taken in 32
bits, and how far it is from that of 64 is printed. They take turns; medians are compared. A peer that is not installed
is left out: pip install torchmetrics cityscapesscripts
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from multidomain_cct.evaluation.scoring import confusion_of, mean_iou

DRAWN = 10
PEERS = {
    "torchmetrics": "torchmetrics.classification",
    "cityscapesscripts": "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
}
"""What pip calls them, and what of them is used."""


@dataclass(frozen=True)
class Pairs:
    """`count` pairs of truth and prediction, of which ten are different."""

    truth: Tensor
    """(10, H, W) uint8."""
    prediction: Tensor
    """(10, H, W) uint8."""
    folder: Path
    """The same as PNG files of Cityscapes' own ids."""
    count: int
    classes: int

    def in_memory(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self.count):
            yield self.truth[number % DRAWN], self.prediction[number % DRAWN]

    def files(self) -> Iterator[tuple[Path, Path]]:
        for number in range(self.count):
            yield self.folder / f"truth_{number % DRAWN}.png", self.folder / f"prediction_{number % DRAWN}.png"


def draw(folder: Path, count: int, size: tuple[int, int], classes: int, ids: np.ndarray) -> Pairs:
    """Regions as truth, of which a border and scattered spots are ignored; the prediction is right in four of five
    regions, ragged at their edges.
    """
    rng = np.random.default_rng(0)
    truths, predictions = [], []
    for number in range(DRAWN):
        regions = Image.fromarray(rng.integers(0, classes, (16, 32), dtype=np.uint8)).resize(
            size, Image.Resampling.NEAREST
        )
        wrong = Image.fromarray(rng.random((16, 32)) < 0.2).resize(size, Image.Resampling.NEAREST)
        truth = np.array(regions)
        prediction = np.where(np.asarray(wrong), (truth + 1) % classes, truth)
        prediction = np.roll(prediction, max(1, size[0] // 512), axis=1)
        truth[: size[1] // 40] = 255
        truth[rng.random(truth.shape) < 0.02] = 255
        for name, picture in (("truth", truth), ("prediction", prediction)):
            Image.fromarray(ids[picture]).save(folder / f"{name}_{number}.png")
        truths.append(truth)
        predictions.append(prediction.astype(np.uint8))
    return Pairs(torch.from_numpy(np.stack(truths)), torch.from_numpy(np.stack(predictions)), folder, count, classes)


def cityscapes_ids() -> tuple[np.ndarray, np.ndarray]:
    """Cityscapes' id of each train id, and train id of each id; 255, ignored, has the id 0."""
    ids, train = np.zeros(256, dtype=np.uint8), np.full(256, 255, dtype=np.uint8)
    ids[:19] = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    train[ids[:19]] = np.arange(19)
    return ids, train


def ours(pairs: Pairs) -> tuple[np.ndarray, float]:
    confusion = torch.zeros(pairs.classes, pairs.classes, dtype=torch.int64)
    for truth, prediction in pairs.in_memory():
        confusion += confusion_of(truth, prediction, pairs.classes)
    return confusion.numpy(), mean_iou(confusion.numpy())


def ours_from_files(pairs: Pairs) -> tuple[np.ndarray, float]:
    train = torch.from_numpy(cityscapes_ids()[1])
    confusion = torch.zeros(pairs.classes, pairs.classes, dtype=torch.int64)
    for names in pairs.files():
        # Tables of 8 bits are looked up in Pillow.
        truth, prediction = (torch.from_numpy(np.array(Image.open(name).point(train.tolist()))) for name in names)
        confusion += confusion_of(truth, prediction, pairs.classes)
    return confusion.numpy(), mean_iou(confusion.numpy())


def torchmetrics(pairs: Pairs, *, checked: bool) -> tuple[np.ndarray, float]:
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(pairs.classes, ignore_index=255, validate_args=checked)
    for truth, prediction in pairs.in_memory():
        metric.update(prediction[None], truth[None])
    return metric.confmat.numpy(), float(metric.compute())


def cityscapes_scripts(pairs: Pairs) -> tuple[np.ndarray, float]:
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as peer

    labels = peer.args.evalLabels = [int(label.id) for label in peer.labels if label.id >= 0]
    settings = SimpleNamespace(evalLabels=labels, evalInstLevelScore=False, evalPixelAccuracy=False)
    counted = peer.generateMatrix(settings)
    for truth, prediction in pairs.files():
        peer.evaluatePair(str(prediction), str(truth), counted, {}, {}, settings)
    scored = cityscapes_ids()[0][: pairs.classes]
    values = [peer.getIouScoreForLabel(int(label), counted, settings) for label in scored]
    return counted[np.ix_(scored, scored)].astype(np.int64), float(np.nanmean(values))


def installed_peers() -> list[str]:
    """The peers that can be imported; one line for each that cannot."""
    present = []
    for name, module in PEERS.items():
        try:
            importlib.import_module(module)
            present.append(name)
        except ImportError as error:
            print(f"{name} is left out: {error}. Install it: pip install {name}", file=sys.stderr)
    return present


def entrants(names: list[str]) -> dict[str, Callable[[Pairs], tuple[np.ndarray, float]]]:
    found: dict[str, Callable[[Pairs], tuple[np.ndarray, float]]] = {"ours": ours}
    if "torchmetrics" in names:
        found["torchmetrics"] = lambda pairs: torchmetrics(pairs, checked=True)
        found["torchmetrics, unchecked"] = lambda pairs: torchmetrics(pairs, checked=False)
    found["ours, from files"] = ours_from_files
    if "cityscapesscripts" in names:
        found["cityscapesScripts, from files"] = cityscapes_scripts
    return found


def measure(options: argparse.Namespace, present: list[str]) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    width, height = (int(side) for side in options.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        pairs = draw(Path(folder), options.images, (width, height), options.classes, cityscapes_ids()[0])
        running = entrants(present)
        seconds: dict[str, list[float]] = {name: [] for name in running}
        counted: dict[str, tuple[np.ndarray, float]] = {}
        for repeat in range(options.repeats):
            for name in list(running) if repeat % 2 == 0 else reversed(list(running)):
                started = time.perf_counter()
                counted[name] = running[name](pairs)
                seconds[name].append(time.perf_counter() - started)
    reference = counted["ours"][0]
    for name, (confusion, _) in counted.items():
        assert np.array_equal(confusion, reference), f"{name} counts other pixels than ours"

    def over_ours(name: str) -> float:
        same = seconds["ours, from files" if name.endswith("files") else "ours"]
        return statistics.median(theirs / mine for theirs, mine in zip(seconds[name], same, strict=True))

    rows = {
        name: {
            "ms_per_image": 1000 * statistics.median(seconds[name]) / options.images,
            "over_ours": over_ours(name),
            "miou_of_its_counts_minus_ours": mean_iou(counted[name][0]) - mean_iou(reference),
            "own_miou_minus_ours": counted[name][1] - mean_iou(reference),
        }
        for name in running
    }
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads",
        "images": options.images,
        "size": options.size,
        "classes": options.classes,
        "ignored": float((pairs.truth == 255).double().mean()),
        "miou": mean_iou(reference),
        "skipped": [name for name in PEERS if name not in present],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", default="2048x1024", help="WIDTHxHEIGHT")
    parser.add_argument("--classes", type=int, default=19, choices=range(2, 20), metavar="2..19")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    present = installed_peers()
    result = measure(options, present)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    table = Table(
        title=f"scoring {options.images} images of {options.size}, {options.classes} classes, {result['date']}, "
        f"{result['machine']}"
    )
    for column in ("", "ms per image", "time / ours", "mIoU - ours", "mIoU as it gives it - ours"):
        table.add_column(column, justify="right")
    for name, row in result["rows"].items():
        differences = (f"{row[key]:.1e}" for key in ("miou_of_its_counts_minus_ours", "own_miou_minus_ours"))
        table.add_row(name, f"{row['ms_per_image']:.2f}", f"{row['over_ours']:.1f}", *differences)
    Console().print(table)


if __name__ == "__main__":
    main()
