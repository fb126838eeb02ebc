"""Prediction of photographs of any size: at the scale of training, in bounded memory, answered at their own size.

Shapes: C classes of the domain, H W size of the photograph, h w size at which the network sees a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, product

import torch
from PIL import Image
from torch import Tensor

from multidomain_cct.data.batches.views import image_tensor
from multidomain_cct.data.images import fitted_size, resized
from multidomain_cct.evaluation.inference import InferenceSettings, mean_probabilities, view_logits
from multidomain_cct.model.network import Segmenter

SAME_SCALE = 1.5
"""Up to this factor from the size of the training images, a photograph is predicted at its own size."""
WHOLE_PIXELS = 2048 * 1024
"""Larger ones are seen in tiles: on a CPU, a ResNet-50 takes 450 to 900 bytes per pixel."""
TILE, MARGIN = 576, 96
"""Side of a tile, and how much the network sees around it, in pixels of the network."""
_BLOCK = 2**22
"""Probabilities that are held at the photograph's size at a time."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""


def trained_size(
    size: tuple[int, int], box: tuple[int, int] | None, typical: tuple[int, int] | None
) -> tuple[int, int]:
    """(width, height) at which the network sees a photograph of this size, so that things are as large as in training.

    `box`: the domain's `size`, into which `pack` shrank its images. Without one, `typical` is the size of the training
    images, if it is known.
    """
    if box is not None or typical is None:
        return fitted_size(size, box)
    factor = math.sqrt(math.prod(typical) / math.prod(size))
    if 1 / SAME_SCALE <= factor <= SAME_SCALE:
        return size
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


@torch.inference_mode()
def photo_probabilities(
    model: Segmenter, photo: Image.Image, domain: str, seen_at: tuple[int, int], settings: InferenceSettings
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Rows and columns of the photograph, and their class probabilities (C, rows, columns), block by block.

    The network sees the RGB photograph at `seen_at` (width, height): whole, or in tiles when that is large.
    """
    device = next(model.parameters()).device
    for core, around in _tiles(photo.size, seen_at):
        part = photo if around == (0, 0, *photo.size) else photo.crop(around)
        size = [
            max(1, round(side * seen / whole)) for side, seen, whole in zip(part.size, seen_at, photo.size, strict=True)
        ]
        pixels = image_tensor(resized(part, (size[0], size[1]))).to(device)
        views = view_logits(model, pixels[None], domain, settings)
        columns = slice(core[0] - around[0], core[2] - around[0])
        step = max(1, _BLOCK // (views[0].shape[1] * part.width))
        for top in range(core[1], core[3], step):
            bottom = min(top + step, core[3])
            strips = [_rows(view, part.height, range(top - around[1], bottom - around[1])) for view in views]
            block = mean_probabilities(strips, (bottom - top, part.width))[0, ..., columns]
            yield (slice(top, bottom), slice(core[0], core[2])), block


def _tiles(size: tuple[int, int], seen_at: tuple[int, int]) -> Iterator[tuple[Box, Box]]:
    """The parts of a photograph of this (width, height), and for each the larger part that the network sees."""
    if math.prod(seen_at) <= WHOLE_PIXELS:
        yield (0, 0, *size), (0, 0, *size)
        return
    spans = []
    for length, seen in zip(size, seen_at, strict=True):
        # Multiples of the strides of encoders, so that a tile's features lie where those of the whole would.
        edges = [*(round(start * length / seen) for start in range(0, seen, TILE)), length]
        margin = round(MARGIN * length / seen)
        spans.append([(a, b, max(0, a - margin), min(length, b + margin)) for a, b in pairwise(edges)])
    for (top, bottom, above, below), (left, right, before, after) in product(spans[1], spans[0]):
        yield (left, top, right, bottom), (before, above, after, below)


def _rows(logits: Tensor, height: int, rows: range) -> Tensor:
    """(1, C, rows, w): these rows of (1, C, h, w) logits that are resized bilinearly to `height`."""
    last = logits.shape[-2] - 1
    centres = torch.arange(rows.start, rows.stop, device=logits.device) + 0.5
    position = (centres * ((last + 1) / height) - 0.5).clamp(0, last)
    above = position.long()
    below = (above + 1).clamp(max=last)
    return torch.lerp(logits[..., above, :], logits[..., below, :], (position - above)[:, None])
