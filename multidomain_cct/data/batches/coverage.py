"""Which classes the masks of labelled images show, and an order of the images in which every class comes early.

Shapes: n images, C classes of the domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from multidomain_cct.data.batches.stored_mask import stored_mask
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.shards.reader import BadSample, Shards

_SHARE = 0.005
"""Share of an image's labelled pixels from which it counts as an image of a class. A class whose median share is
smaller, such as poles, counts from its median.
"""

_MOST_DECODED = 2000
"""Masks that are decoded for a summary, a few seconds."""


@dataclass(frozen=True)
class ClassCounts:
    """What a domain's labelled images show of each class."""

    images: np.ndarray
    """(C,) int64: images with at least one pixel of the class."""
    pixels: np.ndarray
    """(C,) int64."""
    ignored: int
    """Pixels without a class."""


def count_classes(shards: Shards, numbers: Sequence[int], domain: Domain) -> ClassCounts | None:
    """The classes in the masks of these samples; None when that would take decoding very many masks."""
    if sum(not shards.pixels(number) for number in numbers) > _MOST_DECODED:
        return None
    counts = pixels_per_class(shards, numbers, domain)
    return ClassCounts((counts[:, :-1] > 0).sum(0), counts[:, :-1].sum(0), int(counts[:, -1].sum()))


def pixels_per_class(shards: Shards, numbers: Sequence[int], domain: Domain) -> np.ndarray:
    """(n, C + 1) int64: mask pixels of each class; the last column counts ignored ones.

    The masks of shards whose index has no counts are decoded. One that cannot be read counts as empty: training, if it
    uses the image, says so.
    """
    ids = [*range(domain.num_classes), IGNORE]
    rows = ([counts.get(train_id, 0) for train_id in ids] for counts in _counts(shards, numbers, domain))
    return np.array(list(rows), dtype=np.int64).reshape(-1, len(ids))


def _counts(shards: Shards, numbers: Sequence[int], domain: Domain) -> Iterator[dict[int, int]]:
    for number in numbers:
        counts = shards.pixels(number)
        if not counts:
            try:
                record = shards.read(number)
                mask = stored_mask(record.mask or b"", domain, record.where)
                counts = dict(enumerate(mask.histogram()))
            except BadSample:
                pass
        yield counts


def covering_order(pixels: np.ndarray, count: int) -> list[int]:
    """The first `count` rows of `pixels_per_class` in an order in which every class appears early and evenly.

    Each step serves the class with the fewest images so far, the rarest of these first. Of its images it takes the one
    that shows the most classes not seen yet, and then, as ever when all were seen, the first: rows are in random order.
    Images without any class come last.
    """
    shown = _shown(pixels[:, :-1])
    rarity, taken = shown.sum(0), np.zeros(shown.shape[1], dtype=np.int64)
    queues = [np.flatnonzero(column).tolist()[::-1] for column in shown.T]
    order: dict[int, None] = {}
    while len(order) < count:
        for queue in queues:
            while queue and queue[-1] in order:
                queue.pop()
        left = [train_id for train_id, queue in enumerate(queues) if queue]
        if not left:
            break
        served = min(left, key=lambda train_id: (taken[train_id], rarity[train_id]))
        row = queues[served][-1]
        unseen = (taken == 0) & (rarity > 0)
        if unseen.any():
            rows = np.array([row for row in queues[served][::-1] if row not in order])
            row = int(rows[np.argmax(shown[rows][:, unseen].sum(1))])
        order[row] = None
        taken += shown[row]
    rest = (row for row in range(len(pixels)) if row not in order)
    return [*order, *islice(rest, count - len(order))]


def _shown(pixels: np.ndarray) -> np.ndarray:
    """(n, C) bool: whether an image shows enough of a class to count as an image of it."""
    share = pixels / np.maximum(pixels.sum(1, keepdims=True), 1)
    medians = [np.median(column[column > 0]) if column.any() else 1.0 for column in share.T]
    shown: np.ndarray = (share > 0) & (share >= np.minimum(_SHARE, medians))
    return shown
