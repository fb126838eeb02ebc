"""Perturbations of the encoder's features.

Each is a frozen dataclass whose fields are its section of the recipe. Called with the features, the object masks of
the main decoder and a group of auxiliary decoders, it returns perturbed features for each decoder of the group. Every
image is perturbed on its own, differently for each decoder. Randomness comes from torch's global generator, which the
training loop seeds from (seed, step, rank).

Shapes: G decoders of the group, B images, C classes, D feature channels, h w feature size, N object regions of the
whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from multidomain_cct.errors import UserError, require_choice, require_number
from multidomain_cct.model.decoders import DecoderGroup
from multidomain_cct.model.object_masks import ObjectMasks

_DRAWN_STEP = 2.0**-15


class Perturbation(Protocol):
    """What all perturbations have in common."""

    needs_objects: ClassVar[bool]
    """Whether it reads the object masks; a domain whose class table has only things, or only stuff, cannot use it."""

    @property
    def count(self) -> int: ...

    def __call__(self, features: Tensor, objects: ObjectMasks, group: DecoderGroup) -> Tensor:
        """(G, B, D, h, w) perturbed features, for (B, D, h, w) features."""
        ...


@dataclass(frozen=True)
class FeatureNoise:
    """Multiply-and-add uniform noise, z * N + z (F-Noise, CCT section 3.2).

    The authors' code shares one N over the batch; here each image has its own.
    """

    count: int = 6
    """Auxiliary decoders that use it."""
    amplitude: float = 0.3
    """N is uniform between minus and plus this; on a CPU it has at most 65536 values."""
    needs_objects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_number("perturbations.feature_noise.amplitude", self.amplitude, above=0)

    def __call__(self, features: Tensor, objects: ObjectMasks, group: DecoderGroup) -> Tensor:
        return features * _uniform((len(group), *features.shape), features, self.amplitude).add_(1)


@dataclass(frozen=True)
class FeatureDrop:
    """Zero the most active region of each feature map (F-Drop, CCT section 3.2).

    Activity is the mean over channels. The authors' code draws one threshold per batch; here it is one per image. A
    fraction of the maximum is not a fraction of the area: on features without structure `max` drops nearly every
    position, which `quantile` avoids.
    """

    count: int = 6
    """Auxiliary decoders that use it."""
    mode: str = "max"
    """`max`: drop where the activity exceeds a random fraction of its maximum; `quantile`: drop a random fraction of
    the positions, the most active ones.
    """
    low: float = 0.6
    """`max`: smallest fraction of the maximum that is kept, 0 to 1."""
    high: float = 0.9
    """`max`: largest fraction of the maximum that is kept, 0 to 1."""
    area_low: float = 0.1
    """`quantile`: smallest share of the positions that is dropped, 0 to 1."""
    area_high: float = 0.4
    """`quantile`: largest share of the positions that is dropped, 0 to 1."""
    needs_objects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_choice("perturbations.feature_drop.mode", self.mode, ("max", "quantile"))
        for low, high in ((self.low, self.high), (self.area_low, self.area_high)):
            if not 0 <= low <= high <= 1:
                raise UserError(
                    f"perturbations.feature_drop has the range {low} to {high}; it is 0 <= low <= high <= 1."
                )

    def __call__(self, features: Tensor, objects: ObjectMasks, group: DecoderGroup) -> Tensor:
        activity = features.detach().float().mean(dim=1, keepdim=True)  # (B, 1, h, w)
        drawn = torch.empty(len(group), len(features), device=features.device)
        if self.mode == "max":
            peak = activity.amax(dim=(1, 2, 3))  # (B,)
            threshold = drawn.uniform_(self.low, self.high) * peak  # (G, B)
        else:
            ordered = activity.flatten(1).sort(dim=1, descending=True).values  # (B, h*w)
            rank = (drawn.uniform_(self.area_low, self.area_high) * ordered.shape[1]).long()
            threshold = ordered.gather(1, rank.clamp_(max=ordered.shape[1] - 1).T).T  # (G, B)
        return _where(activity <= threshold[..., None, None, None], features)


@dataclass(frozen=True)
class Dropout:
    """Drop whole channels and rescale the rest (DropOut, CCT section 3.2)."""

    count: int = 6
    """Auxiliary decoders that use it."""
    probability: float = 0.5
    """Share of the channels that is dropped, 0 to below 1."""
    needs_objects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_number("perturbations.dropout.probability", self.probability, above=0, below=1)

    def __call__(self, features: Tensor, objects: ObjectMasks, group: DecoderGroup) -> Tensor:
        kept = torch.rand(len(group), *features.shape[:2], 1, 1, device=features.device) >= self.probability
        return features * kept.to(features.dtype).div_(1 - self.probability)


@dataclass(frozen=True)
class ObjectMask:
    """Hide the objects: z * (1 - M), with M where the main decoder predicts a `thing` (Obj-Msk, CCT section 3.2).

    It draws nothing at random: a second decoder that uses it differs only in its initial weights. The authors take
    class 0 as background, which is right for PASCAL VOC alone.
    """

    count: int = 2
    """Auxiliary decoders that use it."""
    needs_objects: ClassVar[bool] = True

    def __call__(self, features: Tensor, objects: ObjectMasks, group: DecoderGroup) -> Tensor:
        return _where(~objects.masks, features).expand(len(group), -1, -1, -1, -1)


@dataclass(frozen=True)
class ContextMask:
    """Hide what surrounds the objects: z * M (Con-Msk, CCT section 3.2). It draws nothing at random."""

    count: int = 2
    """Auxiliary decoders that use it."""
    needs_objects: ClassVar[bool] = True

    def __call__(self, features: Tensor, objects: ObjectMasks, group: DecoderGroup) -> Tensor:
        return _where(objects.masks, features).expand(len(group), -1, -1, -1, -1)


@dataclass(frozen=True)
class GuidedCutout:
    """Zero one rectangle at a random place in the bounding box of each object region (G-Cutout, CCT section 3.2).

    The authors find contours with OpenCV on the CPU and leave out those of fewer than 50 points, so that a plain
    rectangle, whose contour has 4, is never cut. Here regions are found at feature resolution on the features' device,
    and small ones are left out by area.
    """

    count: int = 6
    """Auxiliary decoders that use it."""
    side: float = 0.4
    """Sides of the rectangle as a share of the box's, above 0 to 1; rounded to feature positions, at least one."""
    min_area: int = 4
    """Smallest region that is cut, in feature positions."""
    needs_objects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_number("perturbations.guided_cutout.side", self.side, above=0, at_most=1)
        require_number("perturbations.guided_cutout.min_area", self.min_area, at_least=1)

    def __call__(self, features: Tensor, objects: ObjectMasks, group: DecoderGroup) -> Tensor:
        regions = objects.regions
        extent = regions.end - regions.start  # (2, N), rows and columns
        size = (extent * self.side).round().long().clamp(min=1) * (regions.area >= self.min_area)
        offsets = torch.rand(len(group), extent.shape[1], 2, device=features.device).transpose(1, 2)  # (G, 2, N)
        first = regions.start + (offsets * (extent - size + 1)).long()
        position = torch.arange(max(features.shape[2:]), device=features.device)
        within = (position >= first[..., None]) & (position < (first + size)[..., None])  # (G, 2, N, max(h, w))
        rows, columns = within[:, 0, :, : features.shape[2], None], within[:, 1, :, None, : features.shape[3]]
        cuts = torch.zeros(len(group), len(features), *features.shape[2:], device=features.device)
        cuts.index_add_(1, regions.image, (rows & columns).float())
        return _where((cuts == 0).unsqueeze(2), features)


@dataclass(frozen=True)
class AdversarialNoise:
    """Add the noise of a chosen norm that changes the decoder's prediction most (I-VAT; Miyato et al. 2018, CCT 3.2).

    One power iteration: with d a random direction of unit norm per image, the gradient with respect to d of
    KL(p(z) || p(z + xi d)) is followed. The authors take xi = 1e-6, a difference that 32-bit rounding loses: a
    thousandth of the intended noise is left.
    """

    count: int = 2
    """Auxiliary decoders that use it."""
    xi: float = 0.1
    """Norm of the trial step, at least 0.01; 32-bit numbers lose smaller ones."""
    eps_relative: float = 0.1
    """Norm of the noise as a share of the norm of the image's features."""
    eps: float = 0.0
    """Norm of the noise over the whole map, in place of `eps_relative` when above 0. The authors' is 2; its effect
    depends on the crop.
    """
    needs_objects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_number("perturbations.adversarial_noise.xi", self.xi, at_least=1e-2)
        require_number("perturbations.adversarial_noise.eps", self.eps, at_least=0)
        require_number("perturbations.adversarial_noise.eps_relative", self.eps_relative, at_least=0)
        if self.eps == self.eps_relative == 0:
            raise UserError(
                "perturbations.adversarial_noise: eps and eps_relative are both 0; set one of them above 0."
            )

    def __call__(self, features: Tensor, objects: ObjectMasks, group: DecoderGroup) -> Tensor:
        # In 32 bits or more: the trial step is lost in 16.
        with torch.autocast(features.device.type, enabled=False), torch.no_grad():
            still = features.to(torch.promote_types(features.dtype, torch.float32))
            direction = _uniform((len(group), *still.shape), still)
            # Where anything was drawn, the norm is no less than the smallest draw.
            moved = still + direction.mul_(self.xi / _norm(direction).clamp(min=_DRAWN_STEP))
            gradient = _divergence_gradient(group, still[None], moved)
            # First by the largest entry: where a decoder is certain, gradients are so small that their squares
            # underflow, and the norm would be 0.
            tiny = torch.finfo(gradient.dtype).tiny
            gradient /= gradient.abs().amax(dim=(2, 3, 4), keepdim=True).clamp(min=tiny)
            strength = self.eps if self.eps > 0 else self.eps_relative * _norm(still)
            noise = gradient.div_(_norm(gradient).clamp(min=tiny)).mul_(strength).to(features.dtype)
        return features + noise


def _divergence_gradient(group: DecoderGroup, still: Tensor, moved: Tensor) -> Tensor:
    """(G, B, D, h, w): gradient of KL(p(still) || p(moved)) with respect to the moved features, up to a factor."""
    before, after = group.coarse(still), group.coarse(moved)
    total = torch.zeros_like(after)
    for images, part in group.pieces(after):
        with torch.enable_grad():
            leaf = after[:, images].detach().requires_grad_()
            logits = group.logits(leaf, part)
        # The divergence's gradient with respect to the logits is the difference of the two predictions.
        change = logits.detach().softmax(dim=2).sub_(group.logits(before[:, images], part).softmax(dim=2))
        total[:, images] += torch.autograd.grad(logits, leaf, change)[0]
    classify = group.classify[0].flatten(2)  # (G, C, D)
    return (classify.mT[:, None] @ total.flatten(3)).view_as(moved)


@dataclass(frozen=True)
class Perturbations:
    """The mix: each kind with its count of auxiliary decoders, 0 for none. The defaults are the authors' 30."""

    feature_noise: FeatureNoise = field(default_factory=FeatureNoise)
    """Random noise on every activation."""
    feature_drop: FeatureDrop = field(default_factory=FeatureDrop)
    """The most active region removed."""
    dropout: Dropout = field(default_factory=Dropout)
    """Random channels removed."""
    object_mask: ObjectMask = field(default_factory=ObjectMask)
    """Objects removed."""
    context_mask: ContextMask = field(default_factory=ContextMask)
    """Everything but objects removed."""
    guided_cutout: GuidedCutout = field(default_factory=GuidedCutout)
    """A part of each object removed."""
    adversarial_noise: AdversarialNoise = field(default_factory=AdversarialNoise)
    """Noise in the direction that changes the prediction most."""

    def __post_init__(self) -> None:
        for name, kind in self._kinds().items():
            require_number(f"perturbations.{name}.count", kind.count, at_least=0)

    def each(self, *, objects: bool = True) -> list[Perturbation]:
        """One entry per auxiliary decoder; without `objects` only of perturbations that do not need object masks."""
        return [kind for kind in self._kinds().values() if objects or not kind.needs_objects for _ in range(kind.count)]

    def _kinds(self) -> dict[str, Perturbation]:
        return vars(self)


def _where(kept: Tensor, features: Tensor) -> Tensor:
    """Features at the positions that are kept, else 0. No product: what is dropped may be infinite in 16 bits."""
    return torch.where(kept, features, features.new_zeros(()))


def _uniform(shape: Sequence[int], like: Tensor, bound: float = 1.0) -> Tensor:
    """Random values between -`bound` and `bound`.

    On a CPU they are multiples of 2^-15 of it: 64 random bits cut in four take a third of the time of `uniform_`.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape).uniform_(-bound, bound)
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return bits.view(torch.int16)[:count].view(shape).to(like.dtype).mul_(_DRAWN_STEP * bound)


def _norm(maps: Tensor) -> Tensor:
    """(..., 1, 1, 1): Euclidean norm of each image's whole map."""
    norms: Tensor = torch.linalg.vector_norm(maps, dim=(-3, -2, -1), keepdim=True)
    return norms
