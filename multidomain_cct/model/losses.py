"""Losses on logits and targets.

Every loss is a mean over the valid pixels of each image, then a mean over the images (CCT equations 1 and 2), so it
does not depend on how a batch is cut into processes and micro-batches of equal size. An image without a valid pixel
contributes 0. All are computed in 32 bits or more.

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
from multidomain_cct.errors import UserError, require_choice, require_number
from multidomain_cct.model.distances import DISTANCES, at_least_float32
from multidomain_cct.model.ramps import RAMPS, ramp_at

CLASS_WEIGHTS = ("none", "balanced", "effective")


@dataclass(frozen=True)
class SupervisedSettings:
    """The loss on labelled images."""

    loss: str = "ce"
    """`ce`: cross-entropy; `ab_ce`: annealed bootstrapped cross-entropy, which leaves out pixels that are already right
    with confidence (CCT section 3.1).
    """
    ab_fraction: float = 0.4
    """`ab_ce`: share of the run over which its threshold rises, 0 to 1."""
    ab_high: float = 0.9
    """`ab_ce`: the threshold at the end; it starts at 1/C."""
    colour: float = 0.0
    """Probability that a labelled image gets the strong view's changes of colour and sharpness."""
    cutmix: float = 0.0
    """Probability that a labelled image contains a rectangle, of half its area, of another labelled image."""
    class_weights: str = "none"
    """`none`; `balanced`: each class counts by the inverse of its labelled pixels; `effective`: the same, softer (Cui
    et al. 2019). With `ce` only.
    """
    logit_adjustment: float = 0.0
    """Factor on the log of each class's share of the labelled pixels that is added to the logits in training, so that
    rare classes are predicted more often (Menon et al. 2021); 0: none, 1: as in the paper. With `ce` only.
    """

    def __post_init__(self) -> None:
        require_choice("supervised.loss", self.loss, ("ce", "ab_ce"))
        require_number("supervised.ab_fraction", self.ab_fraction, at_least=0, at_most=1)
        require_number("supervised.ab_high", self.ab_high, at_least=0, at_most=1)
        require_number("supervised.colour", self.colour, at_least=0, at_most=1)
        require_number("supervised.cutmix", self.cutmix, at_least=0, at_most=1)
        require_choice("supervised.class_weights", self.class_weights, CLASS_WEIGHTS)
        require_number("supervised.logit_adjustment", self.logit_adjustment, at_least=0)
        if self.loss == "ab_ce" and (self.class_weights != "none" or self.logit_adjustment):
            raise UserError("supervised.class_weights and logit_adjustment go with supervised.loss=ce, not with ab_ce.")


@dataclass(frozen=True)
class ConsistencySettings:
    """The loss on unlabelled images. A domain's own section replaces single keys of it."""

    weight: float = 30 / 21
    """Weight after the ramp; the default is the authors' 30 at 21 classes. 0 trains without unlabelled images; in the
    recipe's own section, in every domain.
    """
    weight_unit: str = "pixel"
    """`pixel`: the distance is a sum over classes, so a weight means the same in every domain; `authors`: a mean over
    classes, so 30 there is 30/C here.
    """
    distance: str = "mse"
    """Between the main and an auxiliary decoder's class probabilities: `mse`, `kl` (of the auxiliary from the main one)
    or `js` (Jensen-Shannon).
    """
    confidence: float = 0.0
    """Pixels whose main prediction has a smaller largest probability do not count, 0 to below 1."""
    ramp: str = "exp"
    """How the weight rises: `exp`, weight * exp(-5 (1 - t/T)^2); `linear`; `cosine`; `log`,
    weight * (1 - exp(-5 t/T)); `none`.
    """
    ramp_fraction: float = 0.1
    """T as a share of the run, 0 to 1."""
    sample: int = 0
    """`cct`: auxiliary decoders that are drawn for a step, at most as many as there are; 0: all. An unbiased, noisier
    estimate of the mean over them.
    """
    stride: int = 1
    """`cct`: every `stride`-th pixel and row is compared, at a random offset; it divides the encoder's stride.
    Unbiased, noisier.
    """
    weak_weight: float = 0.4
    """Weight, under the same ramp, of the cross-entropy of the auxiliary decoders on pseudo-labels (of a domain with
    `weak_split`).
    """

    def __post_init__(self) -> None:
        require_number("consistency.weight", self.weight, at_least=0)
        require_choice("consistency.weight_unit", self.weight_unit, ("pixel", "authors"))
        require_choice("consistency.distance", self.distance, DISTANCES)
        require_number("consistency.confidence", self.confidence, at_least=0, below=1)
        require_choice("consistency.ramp", self.ramp, RAMPS)
        require_number("consistency.ramp_fraction", self.ramp_fraction, at_least=0, at_most=1)
        require_number("consistency.sample", self.sample, at_least=0)
        require_number("consistency.stride", self.stride, at_least=1)
        require_number("consistency.weak_weight", self.weak_weight, at_least=0)

    def ramp_at(self, progress: float) -> float:
        """Factor on the weights when `progress` (0 to 1) of the run is done."""
        return ramp_at(self.ramp, self.ramp_fraction, progress)

    def weight_per_pixel(self, num_classes: int) -> float:
        """The weight of a distance that is a sum over classes."""
        return self.weight / num_classes if self.weight_unit == "authors" else self.weight


def pixel_cross_entropy(
    logits: Tensor, masks: Tensor, weights: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """(..., B, H, W) cross-entropy in nats of (..., B, C, H, W) logits with (B, H, W) train ids; 0 where ignored.

    Each class has a factor in (C,) `weights`, and (C,) `shift` is added to the logits.
    """
    flat = at_least_float32(logits).flatten(0, -4)  # (N, C, H, W)
    if shift is not None:
        flat = flat + shift.view(-1, 1, 1)
    ids = masks.long().expand(*logits.shape[:-3], *masks.shape[-2:]).reshape(-1, *masks.shape[-2:])
    pixels = F.cross_entropy(flat, ids, weight=weights, ignore_index=IGNORE, reduction="none")
    return pixels.view(*logits.shape[:-3], *masks.shape[-2:])


def bootstrapped_cross_entropy(logits: Tensor, masks: Tensor, threshold: float) -> Tensor:
    """Scalar: cross-entropy over pixels whose true class has a probability under `threshold` (ab-CE, CCT equation 3).

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
    """Scalar: mean over images of the mean of (B, H, W) values over the valid pixels; 0, with a graph, without any."""
    # where, not a product: an invalid pixel may be infinite.
    total = pixels.where(valid, pixels.new_zeros(())).sum(dim=(1, 2))
    return (total / valid.sum(dim=(1, 2)).clamp(min=1)).mean()


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

    def total(self, logits: Tensor, left: Tensor, images: slice, part: slice) -> Tensor:
        """Scalar: the loss on a piece (DecoderGroup.pieces), summed over decoders. All pieces add up to the whole.

        Images that are not `left`, (1 or G, B) bool, contribute 0.
        """
        pixels = self.value(logits, self.target[images][..., part])
        # Filled, not multiplied by 0: what does not count may be infinite.
        counted = self.counted[images][..., part] & left[:, images, None, None]
        sums = pixels.masked_fill(~counted, 0).sum(dim=(2, 3))  # (G, b)
        return (sums / self.divisor[images]).sum()
