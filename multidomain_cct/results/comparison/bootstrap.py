"""How sure a difference of two scores is: a paired bootstrap over images.

Shapes: n images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """Where the difference of two mIoUs lies when the images are drawn anew."""

    low: float
    high: float
    """Ends of the 95 % interval, as fractions."""
    probability: float
    """Share of the draws in which the difference is above 0."""


def paired_interval(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Interval | None:
    """The interval of mIoU(second) - mIoU(first), averaged over seeds: each holds (n, 3, C) counts of the same images.

    Every draw takes n images with replacement, the same ones for both and for all seeds. It says how the difference
    depends on which images are scored, not on the seed of the training. None when the images are not the same.
    """
    pairs = list(zip(first, second, strict=True))
    shapes = {counts.shape for pair in pairs for counts in pair}
    if len(shapes) != 1 or any((one[:, 1] != other[:, 1]).any() for one, other in pairs):
        return None
    images = len(first[0])
    times = np.random.default_rng(0).multinomial(images, [1 / images] * images, size=_DRAWS)
    draws = np.mean([_miou(times, other) - _miou(times, one) for one, other in pairs], axis=0)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(low), float(high), float((draws > 0).mean()))


def _miou(times: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(draws,) mIoU over the images, each counted (draws, n) `times`."""
    right, truth, predicted = np.moveaxis(np.tensordot(times, counts, axes=1), 1, 0)  # (draws, C) each
    union = truth + predicted - right
    occurs = union > 0
    iou = np.divide(right, union, out=np.zeros(union.shape), where=occurs)
    means: np.ndarray = iou.sum(1) / np.maximum(occurs.sum(1), 1)
    return means
