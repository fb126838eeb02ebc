"""The linear last step of a decoder, taken a piece of the pixels at a time.

A loss passes over logits several times: those of a piece stay in a processor's caches meanwhile, and those of all pixels need no memory.

Shapes: B images, C classes, P pixels in the decoder's order, p pixels of a piece, h w feature size, H image height.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

LOGITS_OF_A_THREAD = 2**18
"""In a piece, on a CPU: beyond it, what a loss makes of them leaves the caches before it is used again (benchmarks/step.py)."""
LOGITS_OF_A_GPU = 2**25
"""In a piece, on a GPU (not measured): it bounds the memory only, as small pieces would wait for their launch."""


class LastProduct(ABC):
    """A decoder's last step, not yet taken: what it multiplies, and the logits that come of it, a piece at a time."""

    inputs: tuple[Tensor, ...]
    """What is multiplied, with its graph."""
    length: int
    """Of the axis that pieces are cut along."""
    values: int
    """Logits that a step along it holds."""

    def pieces(self) -> list[slice]:
        """Of equal length, but for the last."""
        most = LOGITS_OF_A_THREAD * torch.get_num_threads() if self.inputs[0].device.type == "cpu" else LOGITS_OF_A_GPU
        count = -(-self.length // max(1, most // self.values))
        size = -(-self.length // count)
        return [slice(start, start + size) for start in range(0, self.length, size)]

    @abstractmethod
    def cut(self, maps: Tensor, piece: slice) -> Tensor:
        """(B, ..., p): the piece of (B, ..., P) maps in the decoder's order."""

    @abstractmethod
    def logits(self, piece: slice) -> Tensor:
        """(B, C, p), without a graph."""

    @abstractmethod
    def no_gradients(self) -> list[Tensor]:
        """Room for the gradients with respect to the inputs, which `add_gradients` fills piece by piece."""

    @abstractmethod
    def add_gradients(self, piece: slice, gradient: Tensor, total: Sequence[Tensor]) -> None:
        """`gradient` is that with respect to the piece's (B, C, p) logits."""


class OverChannels(LastProduct):
    """(F, E) weights times (B, E, n) values; of the F outputs those of a class stand together. Cut along n."""

    def __init__(self, hidden: Tensor, weight: Tensor, num_classes: int) -> None:
        self.inputs = hidden, weight
        self.length, self.values = hidden.shape[2], len(hidden) * len(weight)
        self.classes, self.subpixels = num_classes, len(weight) // num_classes
        self.hidden, self.weight = hidden.detach(), weight.detach()

    def cut(self, maps: Tensor, piece: slice) -> Tensor:
        return maps.reshape(*maps.shape[:-1], self.subpixels, self.length)[..., piece].flatten(-2).contiguous()

    def logits(self, piece: slice) -> Tensor:
        return at_each_position(self.hidden[..., piece], self.weight).view(len(self.hidden), self.classes, -1)

    def no_gradients(self) -> list[Tensor]:
        return [torch.empty_like(self.hidden), torch.zeros_like(self.weight)]

    def add_gradients(self, piece: slice, gradient: Tensor, total: Sequence[Tensor]) -> None:
        outputs = gradient.view(len(gradient), len(self.weight), -1)
        total[0][..., piece] = at_each_position(outputs, self.weight.T)
        # This way round the product is faster than its transpose.
        total[1].add_(torch.bmm(self.hidden[..., piece], outputs.transpose(1, 2)).sum(dim=0).T)


class OverRows(LastProduct):
    """(B, C, h, w) values, interpolated along h by an (h, H) matrix. Cut along H."""

    def __init__(self, hidden: Tensor, rows: Tensor) -> None:
        self.inputs = (hidden,)
        self.length, self.values = rows.shape[1], hidden.shape[0] * hidden.shape[1] * hidden.shape[3]
        self.hidden, self.rows = hidden.detach(), rows

    def cut(self, maps: Tensor, piece: slice) -> Tensor:
        return maps.reshape(*maps.shape[:-1], self.length, self.hidden.shape[3])[..., piece, :].flatten(-2).contiguous()

    def logits(self, piece: slice) -> Tensor:
        with torch.autocast(self.hidden.device.type, enabled=False):
            return (self.rows[:, piece].T @ self.hidden).flatten(2)

    def no_gradients(self) -> list[Tensor]:
        return [torch.zeros_like(self.hidden)]

    def add_gradients(self, piece: slice, gradient: Tensor, total: Sequence[Tensor]) -> None:
        with torch.autocast(self.hidden.device.type, enabled=False):
            maps = gradient.reshape(-1, len(self.rows[0, piece]), self.hidden.shape[3])
            total[0].flatten(0, 1).baddbmm_(self.rows[:, piece].expand(len(maps), -1, -1), maps)


def at_each_position(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C, n) values of a (C, D, 1, 1) convolution on (B, D, n) features: one matrix product per image, several times faster than torch's convolution
    where a matrix has few rows or columns (benchmarks/step.py).
    """
    weights = weight.flatten(1).expand(len(features), -1, -1)
    values = torch.bmm(weights, features)
    return values if bias is None else values.add_(bias[:, None])
