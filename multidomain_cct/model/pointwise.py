"""1x1 convolutions as matrix products, of features as they are or changed.

Shapes: B images, D features of a position, C outputs of a convolution, K convolutions, h w feature size, n positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def at_each_position(features: Tensor, weight: Tensor) -> Tensor:
    """(B, C, n) values of (C, D) weights on (B, D, n) features: one matrix product per image, several times faster than torch's convolution where a matrix has
    few rows or columns (benchmarks/step.py).
    """
    return torch.bmm(weight.expand(len(features), -1, -1), features)


def weight_gradients(features: Tensor, gradient: Tensor) -> Tensor:
    """(B, C, D): of each image, given the gradient with respect to the (B, C, n) values."""
    if features.shape[1] < gradient.shape[1]:
        # With the lower matrix in front the product is faster.
        return torch.bmm(features, gradient.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(gradient, features.transpose(1, 2))


@dataclass(frozen=True)
class Change:
    """What becomes of (B, D, h, w) features, not yet done: they are multiplied by the factor, or the noise is added."""

    factor: Tensor | None = None
    """(B, 1, h, w) bool, (B, D, 1, 1) or (B, D, h, w): of positions, channels or single values."""
    noise: Tensor | None = None
    """(B, D, h, w)."""

    @property
    def kind(self) -> str:
        """`positions` (those that are left) or `channels` when a product can take it without a pass over the features, else `values`."""
        if self.factor is None or self.noise is not None:
            return "values"
        if self.factor.shape[1] == 1 and self.factor.dtype == torch.bool:
            return "positions"
        return "channels" if self.factor.shape[2:] == (1, 1) else "values"

    def of(self, features: Tensor) -> Tensor:
        """(B, D, h, w): the changed features."""
        changed = features if self.factor is None else features * self.factor
        return changed if self.noise is None else changed + self.noise


class ChangedProducts:
    """The values of (K, C, D) weights on the features, changed for each of the K convolutions, and their gradients. No graph is kept.

    A factor of positions goes through the product, and one of channels into the weights: features are many more than either, and several convolutions read
    them once.
    """

    @staticmethod
    def fit(changes: Sequence[Change]) -> bool:
        """Whether these can be together: all are factors of positions, or of channels. Any one can be alone."""
        return len(changes) == 1 or {change.kind for change in changes} in ({"positions"}, {"channels"})

    def __init__(self, features: Tensor, weight: Tensor, changes: Sequence[Change]) -> None:
        """`features` are (B, D, h, w) without gaps, `changes` K that fit."""
        kind = changes[0].kind
        self.inputs = (changes[0].of(features) if kind == "values" else features).flatten(2)  # (B, D, n)
        factors = [change.factor.flatten(2) for change in changes if change.factor is not None]
        self.positions = torch.stack(factors, dim=1) if kind == "positions" else None  # (B, K, 1, n)
        self.channels = torch.stack(factors, dim=1).transpose(2, 3) if kind == "channels" else None  # (B, K, 1, D)
        self.each = factors[0] if kind == "values" and factors else None  # (B, D, n)
        self.unchanged = changes[0].factor is None and changes[0].noise is None
        weights = weight if self.channels is None else weight * self.channels
        self.weights = weights.flatten(-3, -2).expand(len(features), -1, -1)  # (B, K * C, D)
        self.values = torch.bmm(self.weights, self.inputs).view(len(features), *weight.shape[:2], -1)  # (B, K, C, n)
        if self.positions is not None:
            # Not a product: what is hidden may be infinite in 16 bits.
            self.values.masked_fill_(~self.positions, 0)

    def images_left(self) -> list[Tensor | None]:
        """For each change (B,) bool: False where it leaves nothing of an image's features. On a CPU, and for no change, None where something is left of all."""
        # Values that are not 0 come of features that are not 0: those of one output tell it nearly always. On a GPU looking at them would wait.
        on_cpu, convolutions = self.values.device.type == "cpu", self.values.shape[1]
        certain = [self.unchanged] * convolutions if self.unchanged or not on_cpu else self.values[:, :, 0].any(dim=2).all(dim=0).tolist()
        if all(certain):
            return [None] * convolutions
        something = self.inputs != 0
        if self.positions is not None:
            left = (something.any(dim=1)[:, None, None] & self.positions).any(dim=3)[..., 0]  # (B, K)
        elif self.channels is not None:
            left = (something.any(dim=2)[:, None, None] & (self.channels != 0)).any(dim=3)[..., 0]
        else:
            left = something.flatten(1).any(dim=1, keepdim=True)
        return [None if sure else own for sure, own in zip(certain, left.unbind(1), strict=True)]

    def add_gradients(self, gradient: Tensor, total: Tensor) -> Tensor:
        """(K, C, D): that with respect to the weights; that with respect to the features is added to the (B, D, h, w) total, which has no gaps.

        `gradient` is that with respect to the values; it is changed.
        """
        if self.positions is not None:
            gradient.masked_fill_(~self.positions, 0)
        joined, back, flat = gradient.flatten(1, 2), self.weights.transpose(1, 2), total.flatten(2)
        if self.each is not None:
            flat.addcmul_(torch.bmm(back, joined), self.each)
        elif joined.dtype == back.dtype == flat.dtype:
            flat.baddbmm_(back, joined)
        else:
            flat.add_(torch.bmm(back, joined))
        own = weight_gradients(self.inputs, joined).view(*gradient.shape[:3], -1)  # (B, K, C, D)
        return (own if self.channels is None else own * self.channels).sum(dim=0, dtype=total.dtype)
