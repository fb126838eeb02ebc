"""1x1 convolutions as matrix products, of features as they are or changed.

Shapes: B images, D features of a position, C outputs of the convolution, h w feature size, n positions.
"""

from __future__ import annotations

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
    """(B, 1, h, w), (B, D, 1, 1) or (B, D, h, w): of positions, channels or single values."""
    noise: Tensor | None = None
    """(B, D, h, w)."""

    def of(self, features: Tensor) -> Tensor:
        """(B, D, h, w): the changed features."""
        changed = features if self.factor is None else features * self.factor
        return changed if self.noise is None else changed + self.noise


class ChangedProduct:
    """The values of (C, D) weights on changed features, and their gradients. No graph is kept.

    A factor of positions goes through the product, and one of channels into the weights: features are many more than either.
    """

    def __init__(self, features: Tensor, weight: Tensor, change: Change) -> None:
        """`features` are (B, D, h, w)."""
        self.features, self.change = features, change
        self.positions: Tensor | None = None  # (B, 1, n)
        self.channels: Tensor | None = None  # (B, 1, D)
        self.each: Tensor | None = None  # (B, D, n)
        factor = change.factor
        if factor is not None and factor.shape[1] == 1:
            self.positions = factor.flatten(2)
        elif factor is not None and factor.shape[2:] == (1, 1):
            self.channels = factor.flatten(2).transpose(1, 2)
        elif factor is not None:
            self.each = factor.flatten(2)
        self.inputs = (features if self.each is None and change.noise is None else change.of(features)).flatten(2)
        weights = weight.expand(len(features), -1, -1)
        self.weights = weights if self.channels is None else weights * self.channels  # (B, C, D)
        self.values = torch.bmm(self.weights, self.inputs)  # (B, C, n)
        if self.positions is not None:
            self.values.mul_(self.positions)

    def images_left(self) -> Tensor | None:
        """(B,) bool: False where the change leaves nothing of an image's features; None where it leaves something of every image's."""
        if self.change.factor is None and self.change.noise is None:
            return None
        # Values that are not 0 come of features that are not 0: one output's tell it nearly always. On a GPU looking at them would wait.
        if self.values.device.type == "cpu" and all(self.values[:, 0].any(dim=1).tolist()):
            return None
        return self.change.of(self.features).flatten(1).abs().amax(dim=1) != 0

    def add_gradients(self, gradient: Tensor, total: Tensor) -> Tensor:
        """(C, D): that with respect to the weights; that with respect to the features is added to the (B, D, h, w) total, which has no gaps.

        `gradient` is that with respect to the values.
        """
        if self.positions is not None:
            gradient = gradient * self.positions
        flat, back = total.view(*total.shape[:2], -1), self.weights.transpose(1, 2)
        if self.each is not None:
            flat.addcmul_(torch.bmm(back, gradient), self.each)
        elif gradient.dtype == back.dtype == flat.dtype:
            flat.baddbmm_(back, gradient)
        else:
            flat.add_(torch.bmm(back, gradient))
        own = weight_gradients(self.inputs, gradient)
        return (own if self.channels is None else own * self.channels).sum(dim=0)
