"""Perturbations of the encoder's features.

Each is a frozen dataclass: its fields are its section of the recipe, calling it gives perturbed features. Every image of a batch is perturbed on its own.
Randomness comes from torch's global generator, which the training loop seeds from (seed, step, rank).

Shapes: B images, D feature channels, h w feature size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Perturbation(Protocol):
    """What all perturbations have in common."""

    @property
    def count(self) -> int: ...

    def __call__(self, features: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FeatureNoise:
    """Multiply-and-add uniform noise, z * N + z (F-Noise, CCT section 3.2).

    The authors' code shares one N over the batch; here each image has its own.
    """

    count: int = 6
    """Auxiliary decoders that use it."""
    amplitude: float = 0.3
    """N is uniform between minus and plus this."""

    def __post_init__(self) -> None:
        _check_count("feature_noise", self.count)
        if not self.amplitude > 0:
            raise ValueError(f"perturbations.feature_noise.amplitude is {self.amplitude}; it is above 0.")

    def __call__(self, features: Tensor) -> Tensor:
        noise = torch.empty_like(features).uniform_(-self.amplitude, self.amplitude)
        return features * noise + features


@dataclass(frozen=True)
class FeatureDrop:
    """Zero the most active region of each feature map (F-Drop, CCT section 3.2).

    Activity is the mean over channels. The authors' code draws one threshold per batch; here it is one per image. A fraction of the maximum is not a
    fraction of the area: on features without structure `max` drops nearly every position, which `quantile` avoids.
    """

    count: int = 6
    """Auxiliary decoders that use it."""
    mode: str = "max"
    """`max`: drop where the activity exceeds a random fraction of its maximum; `quantile`: drop a random fraction of the positions, the most active ones."""
    low: float = 0.6
    """`max`: smallest fraction of the maximum that is kept, 0 to 1."""
    high: float = 0.9
    """`max`: largest fraction of the maximum that is kept, 0 to 1."""
    area_low: float = 0.1
    """`quantile`: smallest share of the positions that is dropped, 0 to 1."""
    area_high: float = 0.4
    """`quantile`: largest share of the positions that is dropped, 0 to 1."""

    def __post_init__(self) -> None:
        _check_count("feature_drop", self.count)
        if self.mode not in ("max", "quantile"):
            raise ValueError(f"perturbations.feature_drop.mode is {self.mode!r}; it is `max` or `quantile`.")
        for low, high in ((self.low, self.high), (self.area_low, self.area_high)):
            if not 0 <= low <= high <= 1:
                raise ValueError(f"perturbations.feature_drop has the range {low} to {high}; both lie in 0 to 1, the smaller one first.")

    def __call__(self, features: Tensor) -> Tensor:
        activity = features.detach().float().mean(dim=1, keepdim=True)  # (B, 1, h, w)
        images = activity.shape[0]
        if self.mode == "max":
            fraction = torch.empty(images, 1, 1, 1, device=features.device).uniform_(self.low, self.high)
            threshold = fraction * activity.amax(dim=(2, 3), keepdim=True)  # (B, 1, 1, 1)
        else:
            area = torch.empty(images, device=features.device).uniform_(self.area_low, self.area_high)
            ordered = activity.flatten(1).sort(dim=1, descending=True).values  # (B, h*w)
            rank = (area * ordered.shape[1]).long().clamp(max=ordered.shape[1] - 1)
            threshold = ordered.gather(1, rank[:, None])[:, :, None, None]  # (B, 1, 1, 1)
        return features * (activity <= threshold)


@dataclass(frozen=True)
class Dropout:
    """Drop whole channels and rescale the rest (DropOut, CCT section 3.2)."""

    count: int = 6
    """Auxiliary decoders that use it."""
    probability: float = 0.5
    """Share of the channels that is dropped, 0 to below 1."""

    def __post_init__(self) -> None:
        _check_count("dropout", self.count)
        if not 0 < self.probability < 1:
            raise ValueError(f"perturbations.dropout.probability is {self.probability}; it lies between 0 and 1.")

    def __call__(self, features: Tensor) -> Tensor:
        return F.dropout2d(features, self.probability, training=True)


@dataclass(frozen=True)
class Perturbations:
    """The mix: each kind with its count of auxiliary decoders, 0 for none."""

    feature_noise: FeatureNoise = field(default_factory=FeatureNoise)
    """Random noise on every activation."""
    feature_drop: FeatureDrop = field(default_factory=FeatureDrop)
    """The most active region removed."""
    dropout: Dropout = field(default_factory=Dropout)
    """Random channels removed."""

    def each(self) -> list[Perturbation]:
        """One entry per auxiliary decoder."""
        kinds: list[Perturbation] = [getattr(self, kind.name) for kind in fields(self)]
        return [kind for kind in kinds for _ in range(kind.count)]


def _check_count(name: str, count: int) -> None:
    if count < 0:
        raise ValueError(f"perturbations.{name}.count is {count}; it is 0 or more.")
