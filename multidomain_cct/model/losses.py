"""Losses on logits and targets.

Every loss is a mean over the valid pixels of each image, then a mean over the images (CCT equations 1 and 2 are means
over images). A mean of per-image means is the same number however a batch is cut into processes and accumulated
micro-batches. An image without a valid pixel contributes 0. All are computed in 32 bits or more.

Shapes: G decoders of a group, B images, C classes of the domain, H W image size, or any two axes of its pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.data.domain import IGNORE
from multidomain_cct.errors import UserError
from multidomain_cct.model.decoders import Piece
from multidomain_cct.model.distances import DISTANCES
from multidomain_cct.model.ramps import RAMPS, ramp_at

WEIGHT_UNITS = ("pixel", "authors")


@dataclass(frozen=True)
class SupervisedSettings:
    """The loss on labelled images."""

    loss: str = "ce"
    """`ce`: cross-entropy; `ab_ce`: annealed bootstrapped cross-entropy, which leaves out pixels that are already right with confidence (CCT section 3.1)."""
    ab_fraction: float = 0.4
    """`ab_ce`: share of the run over which its threshold rises, 0 to 1."""
    ab_high: float = 0.9
    """`ab_ce`: the threshold at the end; it starts at 1/C."""

    def __post_init__(self) -> None:
        if self.loss not in ("ce", "ab_ce"):
            raise UserError(f"supervised.loss is {self.loss!r}; it is `ce` or `ab_ce`.")
        for name, value in (("ab_fraction", self.ab_fraction), ("ab_high", self.ab_high)):
            if not 0 <= value <= 1:
                raise UserError(f"supervised.{name} is {value}; it lies in 0 to 1.")


@dataclass(frozen=True)
class ConsistencySettings:
    """The loss on unlabelled images. A domain's own section replaces single keys of it."""

    weight: float = 30 / 21
    """Weight after the ramp; the default is the authors' 30 at 21 classes. 0 trains without unlabelled images; in the recipe's own section, in every domain."""
    weight_unit: str = "pixel"
    """`pixel`: the distance is a sum over classes, so a weight means the same in every domain; `authors`: a mean over classes, so 30 there is 30/C here."""
    distance: str = "mse"
    """Between the main and an auxiliary decoder's class probabilities: `mse`, `kl` (of the auxiliary from the main one) or `js` (Jensen-Shannon)."""
    confidence: float = 0.0
    """Pixels whose main prediction has a smaller largest probability do not count, 0 to below 1."""
    ramp: str = "exp"
    """How the weight rises: `exp`, weight * exp(-5 (1 - t/T)^2); `linear`; `cosine`; `log`, weight * (1 - exp(-5 t/T)); `none`."""
    ramp_fraction: float = 0.1
    """T as a share of the run, 0 to 1."""
    sample: int = 0
    """`cct`: auxiliary decoders that are drawn for a step, at most as many as there are; 0: all. An unbiased, noisier estimate of the mean over them."""
    stride: int = 1
    """`cct`: every so-manyth pixel of every so-manyth row is compared, from a random one on; it divides the encoder's stride. Unbiased, noisier."""
    weak_weight: float = 0.4
    """Weight, under the same ramp, of the cross-entropy of the auxiliary decoders on pseudo-labels (of a domain with `weak_split`)."""

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("weak_weight", self.weak_weight)):
            if not value >= 0:
                raise UserError(f"consistency.{name} is {value}; it is 0 or more.")
        for name, allowed in (("weight_unit", WEIGHT_UNITS), ("distance", tuple(DISTANCES)), ("ramp", RAMPS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"consistency.{name} is {getattr(self, name)!r}; it is one of {', '.join(allowed)}.")
        if not 0 <= self.confidence < 1:
            raise UserError(
                f"consistency.confidence is {self.confidence}; a probability that can be exceeded lies in 0 to below 1."
            )
        if self.sample < 0:
            raise UserError(f"consistency.sample is {self.sample}; it is a number of auxiliary decoders, or 0 for all.")
        if self.stride < 1:
            raise UserError(f"consistency.stride is {self.stride}; it is at least 1, which compares every pixel.")
        if not 0 <= self.ramp_fraction <= 1:
            raise UserError(f"consistency.ramp_fraction is {self.ramp_fraction}; it lies in 0 to 1.")

    def ramp_at(self, progress: float) -> float:
        """Factor on the weights when `progress` (0 to 1) of the run is done."""
        return ramp_at(self.ramp, self.ramp_fraction, progress)

    def weight_per_pixel(self, num_classes: int) -> float:
        """The weight of a distance that is a sum over classes."""
        return self.weight / num_classes if self.weight_unit == "authors" else self.weight


def pixel_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """(..., B, H, W) cross-entropy in nats of (..., B, C, H, W) logits with (B, H, W) train ids; 0 at pixels of id 255."""
    flat = at_least_float32(logits).flatten(0, -4)  # (N, C, H, W)
    ids = masks.long().expand(*logits.shape[:-3], *masks.shape[-2:]).reshape(-1, *masks.shape[-2:])
    pixels = F.cross_entropy(flat, ids, ignore_index=IGNORE, reduction="none")
    return pixels.view(*logits.shape[:-3], *masks.shape[-2:])


def bootstrapped_cross_entropy(logits: Tensor, masks: Tensor, threshold: float) -> Tensor:
    """Scalar: cross-entropy over the pixels whose true class has a probability under `threshold` (ab-CE, CCT equation 3).

    At least one pixel of each image counts, the one with the smallest probability.
    """
    pixels = pixel_cross_entropy(logits, masks)  # -log of the true class's probability
    valid = masks != IGNORE
    hardest = pixels.detach().where(valid, -math.inf).amax(dim=(1, 2), keepdim=True)  # (B, 1, 1)
    # Where several pixels share the smallest probability, all of them count.
    # Not the same as `>`: a pixel that is nan counts, so that the loss shows it.
    hard = ~(pixels.detach() <= (-math.log(threshold) if threshold > 0 else math.inf)) | (pixels.detach() == hardest)
    return mean_over_valid(pixels, valid & hard)


def ab_threshold(settings: SupervisedSettings, num_classes: int, progress: float) -> float:
    """Threshold of `ab_ce`, from 1/C to `ab_high`: 1/C + (high - 1/C)(1 - exp(-5 t/T))."""
    low = 1 / num_classes
    return low + (settings.ab_high - low) * ramp_at("log", settings.ab_fraction, progress)


def confident(target: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """(B, H, W) bool: the valid pixels whose largest target probability reaches the threshold."""
    return valid if threshold == 0 else valid & (target.amax(dim=1) >= threshold)


def mean_over_valid(pixels: Tensor, valid: Tensor) -> Tensor:
    """Scalar: mean over images of the mean of (B, H, W) values over the valid pixels; 0, with a graph, where none is."""
    # where, not a product: an invalid pixel may be infinite.
    total = pixels.where(valid, pixels.new_zeros(())).sum(dim=(1, 2))
    return (total / valid.sum(dim=(1, 2)).clamp(min=1)).mean()


def at_least_float32(logits: Tensor) -> Tensor:
    """The logits in 32 bits or more."""
    return logits.float() if logits.itemsize < 4 else logits


@dataclass(frozen=True)
class PixelLoss:
    """A value per pixel, averaged like every loss here, for decoders that are taken in groups and in pieces of pixels.

    The pixels, H W below, are in the decoders' order.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    """(G, B, C, H, W) logits and the target -> (G, B, H, W), in 32 bits or more."""
    target: Tensor
    """(B, C, H, W) probabilities or (B, H, W) ids."""
    counted: Tensor
    """(B, H, W) bool."""

    @cached_property
    def divisor(self) -> Tensor:
        """(B,): pixels of each image that count, times the number of images."""
        return self.counted.sum(dim=(1, 2)).clamp(min=1) * len(self.counted)

    def total(self, logits: Tensor, left: Tensor, piece: Piece) -> Tensor:
        """Scalar: the sum over decoders of the loss on a piece of the pixels; the pieces' sums add up to the whole.

        Images that are not `left`, (G, B) bool, contribute 0.
        """
        pixels = self.value(logits, piece.of(self.target))
        # where, not products: what does not count may be infinite.
        counted = piece.of(self.counted) & left[:, piece.images, None, None]
        images = pixels.where(counted, pixels.new_zeros(())).sum(dim=(2, 3))  # (G, b)
        return (images / self.divisor[piece.images]).sum()
