"""Scores: an int64 confusion matrix per domain, and what follows from it.

Shapes: B images, C classes of the domain, H W size of the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multidomain_cct.data.batches.loader import ScoredImage, scored_images
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.evaluation.inference import InferenceSettings, class_probabilities
from multidomain_cct.model.network import Segmenter

_WAITING = 4
"""Batches' worth of images that wait for others of their size."""


@dataclass(frozen=True)
class Score:
    """How well one domain's split is segmented."""

    domain: Domain
    split: str
    confusion: np.ndarray
    """(C, C) int64 pixels; rows are the truth, columns the prediction."""
    counts: np.ndarray
    """(n, 3, C) int64 pixels of each image, in the order of the shards: right, in the truth, in the prediction."""
    sizes: tuple[str, ...]
    """Resolutions of the labels, WIDTHxHEIGHT, that were scored."""
    settings: InferenceSettings

    @property
    def images(self) -> int:
        return len(self.counts)

    @property
    def iou(self) -> dict[str, float | None]:
        """Intersection over union per class, 0 to 1; None for a class in neither truth nor prediction."""
        return {label.name: value for label, value in zip(self.domain.classes, class_iou(self.confusion), strict=True)}

    @property
    def miou(self) -> float:
        """Mean over the classes that occur in truth or prediction, 0 to 1."""
        return mean_iou(self.confusion)

    @property
    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels that are right, 0 to 1."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def protocol(self) -> str:
        """How the number was made, in one line."""
        counted = sum(value is not None for value in self.iou.values())
        sizes = self.sizes[0] if len(self.sizes) == 1 else f"{len(self.sizes)} sizes"
        return (
            f"{self.domain.name}/{self.split}: {self.images} images at label resolution ({sizes}), "
            f"{self.settings.described}, mean over {counted} of {self.domain.num_classes} classes"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "images": self.images,
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "iou": self.iou,
            "confusion": self.confusion.tolist(),
            "protocol": self.protocol,
        }


def class_iou(confusion: np.ndarray) -> list[float | None]:
    """Intersection over union of each class, None where the class is in neither truth nor prediction."""
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return [float(h) / float(u) if u else None for h, u in zip(hits, union, strict=True)]


def mean_iou(confusion: np.ndarray) -> float:
    """Mean over the classes that have an IoU, 0 to 1; 0 when none has."""
    values = [value for value in class_iou(confusion) if value is not None]
    return float(np.mean(values)) if values else 0.0


def confusion_of(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """(C, C) int64: pixels by truth and prediction, of uint8 train ids of equal shape. Ignored pixels do not count.

    One count of truth x C + prediction. Ignored pixels are counted in row 255, which is cut off: taking them out first
    costs more than all the rest. 16 bits, where they suffice, take half the time of 64.
    """
    dtype = torch.int16 if IGNORE * (num_classes + 1) <= torch.iinfo(torch.int16).max else torch.int32
    # Each is narrowed by itself: adding different types converts value by value.
    pairs = truth.to(dtype).mul_(num_classes).add_(prediction.to(dtype))
    counts = torch.bincount(pairs.flatten(), minlength=num_classes**2)
    return counts[: num_classes**2].view(num_classes, num_classes)


def arithmetic_and_harmonic(values: list[float]) -> tuple[float, float]:
    """Both means over domains; the harmonic one is 0 when a value is."""
    return float(np.mean(values)), 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


@dataclass(frozen=True)
class Share:
    """One process's part of an evaluation by several: every `world`-th image, from number `rank`."""

    rank: int = 0
    world: int = 1
    total: Callable[[Tensor], Tensor] = lambda count: count
    """Sums a tensor over the processes."""
    between: Callable[[], None] = lambda: None
    """Called before each image, equally often in every process; it may raise to end the scoring."""


@torch.inference_mode()
def score(
    model: Segmenter,
    shards: Shards,
    domain: Domain,
    split: str,
    settings: InferenceSettings,
    *,
    workers: int = 0,
    share: Share | None = None,
) -> Score:
    """Score every image of a split once, on the model's device; `share` None: in this process alone."""
    share, device = share or Share(), next(model.parameters()).device
    was_training = model.training
    model.eval()
    confusion = torch.zeros(domain.num_classes, domain.num_classes, dtype=torch.int64, device=device)
    counts = torch.zeros(len(shards), 3, domain.num_classes, dtype=torch.int64, device=device)
    scored = torch.zeros(1, dtype=torch.int64, device=device)
    sizes = set()
    numbers = range(share.rank, len(shards), share.world)
    images = scored_images(shards, domain, numbers, workers=workers, pin_memory=device.type == "cuda")
    for batch in _batches(zip(numbers, images, strict=True), settings.batch, share.between):
        height, width = batch[0][1].mask.shape
        # Stacked as they lie in memory, pixel by pixel: putting channel after channel takes several times as long. And
        # stacked on the device: what the host stacks is no longer pinned.
        pictures = _stacked([item.image.permute(1, 2, 0) for _, item in batch], device).permute(0, 3, 1, 2)
        masks = _stacked([item.mask for _, item in batch], device)
        prediction = class_probabilities(model, pictures, domain.name, (height, width), settings).argmax(dim=1)
        for (number, _), mask, ids in zip(batch, masks, prediction, strict=True):
            pixels = confusion_of(mask, ids, domain.num_classes)
            confusion += pixels
            counts[number] = torch.stack([pixels.diagonal(), pixels.sum(1), pixels.sum(0)])
        scored += len(batch)
        sizes.add(f"{width}x{height}")
    if len(numbers) < math.ceil(len(shards) / share.world):
        share.between()
    model.train(was_training)
    confusion, counts, total = share.total(confusion), share.total(counts), int(share.total(scored))
    assert total == len(shards), f"{total} of {len(shards)} images were scored"
    return Score(domain, split, confusion.cpu().numpy(), counts.cpu().numpy(), tuple(sorted(sizes)), settings)


def _stacked(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([part.to(device, non_blocking=True) for part in parts])


def _batches(
    images: Iterable[tuple[int, ScoredImage]], size: int, between: Callable[[], None]
) -> Iterator[list[tuple[int, ScoredImage]]]:
    """Numbered images, up to `size` of equal shapes together, wherever they are in the split; `between` is called
    before each image.
    """
    waiting: dict[Any, list[tuple[int, ScoredImage]]] = {}
    for number, item in images:
        between()
        shape = (item.image.shape, item.mask.shape)
        waiting.setdefault(shape, []).append((number, item))
        if len(waiting[shape]) == size:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) > _WAITING * size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()
