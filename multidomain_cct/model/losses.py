"""Losses on logits and targets.

Every loss is a mean over the valid pixels of each image, then a mean over the images (CCT equations 1 and 2 are means over images). A mean of per-image means
is the same number however a batch is cut into processes and accumulated micro-batches. An image without a valid pixel contributes 0. All are computed in 32
bits or more.

Shapes: B images, C classes of the domain, H W image size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.data.domain import IGNORE


def cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Scalar: cross-entropy of (B, C, H, W) logits with (B, H, W) train ids, in nats; pixels of id 255 do not count."""
    pixels = F.cross_entropy(_at_least_float32(logits), masks.long(), ignore_index=IGNORE, reduction="none")
    return mean_over_valid(pixels, masks != IGNORE)


def squared_distance(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Scalar: squared distance between softmax of (B, C, H, W) logits and (B, C, H, W) target probabilities, summed over classes, between 0 and 2.

    The authors take the mean over classes too, so that the same weight weighs domains of many classes less; here it does not.
    """
    probabilities = _at_least_float32(logits).softmax(dim=1)
    return mean_over_valid((probabilities - target).square().sum(dim=1), valid)


def mean_over_valid(pixels: Tensor, valid: Tensor) -> Tensor:
    """Scalar: mean over images of the mean of (B, H, W) values over the pixels where (B, H, W) valid holds; 0, with a graph, where none does."""
    weight = valid.to(pixels.dtype)
    # where, not a product: an invalid pixel may be infinite.
    total = pixels.where(valid, pixels.new_zeros(())).sum(dim=(1, 2))
    return (total / weight.sum(dim=(1, 2)).clamp(min=1)).mean()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.itemsize < 4 else logits
