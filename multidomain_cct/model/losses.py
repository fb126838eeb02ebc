"""Losses on logits and targets.

Every loss is a mean over the valid pixels of each image, then a mean over the images (CCT equations 1 and 2 are means over images). A mean of per-image means
is the same number however a batch is cut into processes and accumulated micro-batches. An image without a valid pixel contributes 0. All are computed in 32
bits or more.

Shapes: B images, C classes of the domain, H W image size, * any pixel dimensions: (H, W), or all pixels in whatever order.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from multidomain_cct.data.domain import IGNORE
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
            raise ValueError(f"supervised.loss is {self.loss!r}; it is `ce` or `ab_ce`.")
        for name, value in (("ab_fraction", self.ab_fraction), ("ab_high", self.ab_high)):
            if not 0 <= value <= 1:
                raise ValueError(f"supervised.{name} is {value}; it lies in 0 to 1.")


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
                raise ValueError(f"consistency.{name} is {value}; it is 0 or more.")
        for name, allowed in (("weight_unit", WEIGHT_UNITS), ("distance", tuple(DISTANCES)), ("ramp", RAMPS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"consistency.{name} is {getattr(self, name)!r}; it is one of {', '.join(allowed)}.")
        if not 0 <= self.confidence < 1:
            raise ValueError(f"consistency.confidence is {self.confidence}; a probability that can be exceeded lies in 0 to below 1.")
        if self.sample < 0:
            raise ValueError(f"consistency.sample is {self.sample}; it is a number of auxiliary decoders, or 0 for all.")
        if self.stride < 1:
            raise ValueError(f"consistency.stride is {self.stride}; it is at least 1, which compares every pixel.")
        if not 0 <= self.ramp_fraction <= 1:
            raise ValueError(f"consistency.ramp_fraction is {self.ramp_fraction}; it lies in 0 to 1.")

    def ramp_at(self, progress: float) -> float:
        """Factor on the weights when `progress` (0 to 1) of the run is done."""
        return ramp_at(self.ramp, self.ramp_fraction, progress)

    def weight_per_pixel(self, num_classes: int) -> float:
        """The weight of a distance that is a sum over classes."""
        return self.weight / num_classes if self.weight_unit == "authors" else self.weight


def pixel_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """(B, *): cross-entropy in nats; 0 at pixels of id 255."""
    return F.cross_entropy(at_least_float32(logits), masks.long(), ignore_index=IGNORE, reduction="none")


def bootstrapped_cross_entropy(logits: Tensor, masks: Tensor, threshold: float) -> Tensor:
    """Scalar: cross-entropy over the pixels whose true class has a probability under `threshold` (ab-CE, CCT equation 3).

    At least one pixel of each image counts, the one with the smallest probability.
    """
    pixels = pixel_cross_entropy(logits, masks)  # -log of the true class's probability
    valid = masks != IGNORE
    hardest = pixels.detach().where(valid, -math.inf).flatten(1).amax(dim=1).view(-1, *[1] * (pixels.ndim - 1))  # (B, 1, 1)
    # Equal to the hardest only when it is the hardest: of several equal ones all count.
    # Not the same as `>`: a pixel that is nan counts, so that the loss shows it.
    hard = ~(pixels.detach() <= (-math.log(threshold) if threshold > 0 else math.inf)) | (pixels.detach() == hardest)
    return mean_over_valid(pixels, valid & hard)


def ab_threshold(settings: SupervisedSettings, num_classes: int, progress: float) -> float:
    """Threshold of `ab_ce`, from 1/C to `ab_high`: 1/C + (high - 1/C)(1 - exp(-5 t/T))."""
    low = 1 / num_classes
    return low + (settings.ab_high - low) * ramp_at("log", settings.ab_fraction, progress)


def confident(target: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """(B, *) bool: the valid pixels whose largest target probability reaches the threshold."""
    return valid if threshold == 0 else valid & (target.amax(dim=1) >= threshold)


def mean_over_valid(pixels: Tensor, valid: Tensor) -> Tensor:
    """Scalar: mean over images of the mean of (B, *) values over the pixels where (B, *) valid holds; 0, with a graph, where none does."""
    # where, not a product: an invalid pixel may be infinite.
    total = pixels.where(valid, pixels.new_zeros(())).flatten(1).sum(dim=1)
    return (total / valid.flatten(1).sum(dim=1).clamp(min=1)).mean()


def at_least_float32(logits: Tensor) -> Tensor:
    """The logits in 32 bits or more."""
    return logits.float() if logits.itemsize < 4 else logits


# Losses with their gradients. Autograd would keep the probabilities and every step on the way to the loss, and what hangs on the target alone would be
# computed for each of many decoders.


class Term(ABC):
    """A loss on logits that many decoders give for the same images: `mean_over_valid` of a value per pixel, with its gradient.

    The gradient lies in memory that the next call uses again: fresh memory of this size costs a CPU as much time as the arithmetic. All tensors that a term
    has are per pixel, pixels last.
    """

    def __init__(self, valid: Tensor, dtype: torch.dtype) -> None:
        """(B, *) bool: the pixels that count."""
        self.valid = valid
        counts = valid.flatten(1).sum(dim=1).clamp(min=1) * len(valid)
        self.weight = valid.to(dtype) / counts.view(-1, *[1] * (valid.ndim - 1))  # (B, *)
        self._rooms: list[Tensor] = []

    def room(self, number: int, like: Tensor) -> Tensor:
        """Memory for a tensor like this one, the same in every call, and for all parts of a term."""
        if number == len(self._rooms):
            self._rooms.append(like.new_empty(like.numel()))
        elif self._rooms[number].numel() < like.numel():
            self._rooms[number] = like.new_empty(like.numel())
        return self._rooms[number][: like.numel()].view(like.shape)

    def part(self, cut: Callable[[Tensor], Tensor]) -> Self:
        """The term on some of the pixels: `cut` takes them from (B, ..., P) maps. The losses of the parts of a whole add up."""
        part = copy.copy(self)
        vars(part).update({name: cut(value) for name, value in vars(self).items() if isinstance(value, Tensor)})
        return part

    def __call__(self, logits: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to (B, C, *) logits, in 32 bits or more. Images that are not `kept`, (B,) bool, None for all, count as 0."""
        pixels, gradient = self.weighted(at_least_float32(logits.detach()))
        valid = self.valid
        if kept is not None:
            valid = valid & kept.view(-1, *[1] * (valid.ndim - 1))
            gradient.masked_fill_(~kept.view(-1, *[1] * (gradient.ndim - 1)), 0)
        # where, not a product: an invalid pixel may be infinite.
        return pixels.where(valid, pixels.new_zeros(())).sum(), gradient

    @abstractmethod
    def weighted(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted value of each pixel, (B, *), of which those that count add up to the loss, and their gradient, (B, C, *)."""


class SquaredDistance(Term):
    """Of softmax(logits) to (B, C, *) target probabilities, summed over classes, between 0 and 2.

    The authors take the mean over classes too, so that the same weight weighs domains of many classes less; here it does not.
    """

    def __init__(self, target: Tensor, valid: Tensor) -> None:
        super().__init__(valid, target.dtype)
        # The 2 of the gradient costs a pass over all classes less here.
        self.twice = 2 * self.weight.unsqueeze(1)  # (B, 1, *)
        self.negative = -self.twice * target
        self.fourfold = 4 * self.weight

    def weighted(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.softmax(logits, dim=1, out=self.room(0, logits))
        difference = torch.addcmul(self.negative, own, self.twice, out=self.room(1, logits))  # 2 weight (own - target)
        gradient = _through_softmax(own, difference, out=own)
        # The weights of the pixels that count are above 0, and only these are summed.
        return difference.square_().sum(dim=1).div_(self.fourfold), gradient


class KullbackLeibler(Term):
    """KL(target || softmax(logits)) in nats, 0 or more. The authors' masked and unmasked forms differ by a factor C; this is the textbook one."""

    def __init__(self, target: Tensor, valid: Tensor) -> None:
        super().__init__(valid, target.dtype)
        self.negative = -target * self.weight.unsqueeze(1)
        self.own = torch.xlogy(target, target).sum(dim=1) * self.weight

    def weighted(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        own_log = logits.log_softmax(dim=1)
        pixels = self.own + torch.mul(self.negative, own_log, out=self.room(0, logits)).sum(dim=1)
        return pixels, torch.addcmul(self.negative, own_log.exp_(), self.weight.unsqueeze(1), out=self.room(0, logits))


class JensenShannon(Term):
    """Jensen-Shannon divergence of softmax(logits) and target in nats, symmetric, between 0 and ln 2.

    It is the mean of both divergences *from* their mixture; the authors' code takes those *of* the mixture, which have no bound.
    """

    def __init__(self, target: Tensor, valid: Tensor) -> None:
        super().__init__(valid, target.dtype)
        self.target = target
        self.own = torch.xlogy(target, target).sum(dim=1)

    def weighted(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        own_log = logits.log_softmax(dim=1)
        own = own_log.exp()
        # Where both probabilities underflow, the logarithm must stay finite for 0 * log 0 to be 0.
        mixture_log = ((own + self.target) / 2).clamp_(min=torch.finfo(own.dtype).tiny).log_()
        ratio_log = own_log.sub_(mixture_log)
        pixels = self.own + (own * ratio_log - self.target * mixture_log).sum(dim=1)
        half = self.weight / 2
        return pixels * half, _through_softmax(own, ratio_log, out=self.room(0, logits)).mul_(half.unsqueeze(1))


class CrossEntropy(Term):
    """With (B, *) train ids; pixels of id 255 do not count."""

    def __init__(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(ids != IGNORE, dtype)
        self.known = ids.long().where(self.valid, 0).unsqueeze(1)

    def weighted(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        own_log = logits.log_softmax(dim=1)
        pixels = -own_log.gather(1, self.known).squeeze(1)
        gradient = own_log.exp_().scatter_add_(1, self.known, own_log.new_full((), -1.0).expand(self.known.shape))
        return pixels * self.weight, gradient.mul_(self.weight.unsqueeze(1))


DISTANCES: dict[str, Callable[[Tensor, Tensor], Term]] = {"mse": SquaredDistance, "kl": KullbackLeibler, "js": JensenShannon}
"""By name in the recipe: (target probabilities, valid) -> term."""


def differentiable(term: Term, logits: Tensor) -> Tensor:
    """Scalar: the term's loss, for autograd."""
    loss: Tensor = _WithGradient.apply(logits, term)  # type: ignore[no-untyped-call]
    return loss


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, term: Term) -> Tensor:
        loss, gradient = term(logits)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * factor).to(ctx.dtype), None


def _through_softmax(own: Tensor, gradient: Tensor, *, out: Tensor) -> Tensor:
    """The gradient with respect to logits, given their softmax and the gradient with respect to that; `out` may be the softmax."""
    # What autograd calls for a softmax: one pass, where products and sums of tensors are three.
    through: Tensor = torch.ops.aten._softmax_backward_data.out(gradient, own, 1, own.dtype, grad_input=out)
    return through
