"""How a decoder comes from the logits of feature positions to those of pixels, with gradients by hand.

Its last step is linear and is taken a piece of the pixels at a time: a loss passes over logits several times, and those of a piece stay in a processor's caches
meanwhile, where those of all pixels would need memory. By hand, because a step calls many decoders, and each time autograd's bookkeeping would take as long as
the arithmetic of a small one.

Shapes: B images, C classes, P pixels in the decoder's order, p pixels of a piece, h w feature size, n positions, H W image size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.model.pointwise import at_each_position, weight_gradients

LOGITS_OF_A_THREAD = 2**18
"""In a piece, on a CPU: beyond it, what a loss makes of them leaves the caches before it is used again (benchmarks/step.py)."""
LOGITS_OF_A_GPU = 2**25
"""In a piece, on a GPU (not measured): it bounds the memory only, as small pieces would wait for their launch."""


class Upsampling(ABC):
    """One way from coarse logits to those of pixels, its last step not yet taken."""

    length: int
    """Of the axis that pieces are cut along."""
    values: int
    """Logits that a step along it holds."""
    device: torch.device

    def pieces(self) -> list[slice]:
        """Of equal length, but for the last."""
        most = LOGITS_OF_A_THREAD * torch.get_num_threads() if self.device.type == "cpu" else LOGITS_OF_A_GPU
        count = -(-self.length // max(1, most // self.values))
        size = -(-self.length // count)
        return [slice(start, start + size) for start in range(0, self.length, size)]

    @abstractmethod
    def cut(self, maps: Tensor, piece: slice) -> Tensor:
        """(B, ..., p): the piece of (B, ..., P) maps in the decoder's order."""

    @abstractmethod
    def logits(self, piece: slice) -> Tensor:
        """(B, C, p). Autograd can follow them to what the upsampling was built from."""

    @abstractmethod
    def no_gradients(self) -> list[Tensor]:
        """Room for what `add_gradients` collects of all pieces."""

    @abstractmethod
    def add_gradients(self, piece: slice, gradient: Tensor, total: Sequence[Tensor]) -> None:
        """`gradient` is that with respect to the piece's (B, C, p) logits."""

    @abstractmethod
    def gradients(self, total: Sequence[Tensor]) -> list[Tensor]:
        """Of all pieces: that with respect to the coarse logits, their positions flat, then those with respect to the weights."""


class SubPixels(Upsampling):
    """Doublings by 1x1 convolutions from the C logits of a position to those of its four sub-pixels, with a ReLU before each but the first. Cut along what the
    last one takes.
    """

    def __init__(self, coarse: Tensor, weights: Sequence[Tensor], rows: Sequence[slice]) -> None:
        """(B, C + 1, n) coarse logits, the last ones of which become 1; for each doubling its weights, as `with_ones` makes them, and which of its outputs are
        wanted.
        """
        self.device, self.classes, self.whole, self.rows = coarse.device, coarse.shape[1] - 1, weights, rows
        # Without a doubling the last step takes the coarse logits as they are.
        self.weights = [weight[own] for weight, own in zip(weights, rows, strict=True)] or [torch.eye(self.classes, self.classes + 1).to(coarse)]
        coarse[:, -1] = 1
        self.inputs = [coarse]  # of each doubling, (B, C + 1, n')
        for weight in self.weights[:-1]:
            self.inputs.append(at_each_position(self.inputs[-1], weight).relu_().view(len(coarse), self.classes + 1, -1))
        self.length, self.values = self.inputs[-1].shape[2], len(coarse) * len(self.weights[-1])

    @staticmethod
    def with_ones(weight: Tensor, bias: Tensor, *, last: bool) -> Tensor:
        """(K, 4C, C + 1) for (K, 4C, C, 1, 1) weights and (K, 4C) biases of K decoders; if not of the last doubling, (K, 4C + 4, C + 1).

        A last channel of ones takes the biases through the products: adding them, and summing their gradients, would be passes over all pixels. Four further
        outputs keep it.
        """
        joined = torch.cat([weight.flatten(2), bias[..., None]], dim=2)
        return joined if last else torch.cat([joined, F.pad(joined.new_zeros(len(joined), 4, weight.shape[2]), (0, 1), value=1.0)], dim=1)

    @staticmethod
    def without_ones(joined: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and biases again."""
        own = joined[:, : 4 * (joined.shape[2] - 1)]
        return own[..., :-1, None, None], own[..., -1]

    def cut(self, maps: Tensor, piece: slice) -> Tensor:
        return maps.reshape(*maps.shape[:-1], -1, self.length)[..., piece].flatten(-2).contiguous()

    def logits(self, piece: slice) -> Tensor:
        return at_each_position(self.inputs[-1][..., piece], self.weights[-1]).view(len(self.inputs[-1]), self.classes, -1)

    def no_gradients(self) -> list[Tensor]:
        return [torch.empty_like(self.inputs[-1]), torch.zeros_like(self.weights[-1])]

    def add_gradients(self, piece: slice, gradient: Tensor, total: Sequence[Tensor]) -> None:
        outputs = gradient.view(len(gradient), len(self.weights[-1]), -1)
        total[0][..., piece] = at_each_position(outputs, self.weights[-1].T)
        total[1].add_(weight_gradients(self.inputs[-1][..., piece], outputs).sum(dim=0, dtype=total[1].dtype))

    def gradients(self, total: Sequence[Tensor]) -> list[Tensor]:
        of_inputs, found = total[0], [total[1]]
        for number in range(len(self.weights) - 1, 0, -1):
            below, weight = self.inputs[number - 1], self.weights[number - 1]
            outputs = torch.ops.aten.threshold_backward(of_inputs, self.inputs[number], 0).view(len(below), len(weight), -1)
            found.insert(0, weight_gradients(below, outputs).sum(dim=0, dtype=weight.dtype))
            of_inputs = at_each_position(outputs, weight.T)
        # There may be no doubling.
        return [of_inputs, *map(_in_rows, found, self.rows, self.whole)]


def _in_rows(gradient: Tensor, rows: slice, whole: Tensor) -> Tensor:
    """The gradient of some rows of a matrix as that of all of them."""
    if rows == slice(None):
        return gradient
    found = torch.zeros_like(whole)
    found[rows] = gradient
    return found


class Interpolation(Upsampling):
    """(B, C, h, w) logits and their (C,) bias, interpolated by (h, H) and (w, W) matrices. Cut along H."""

    def __init__(self, coarse: Tensor, bias: Tensor, rows: Tensor, columns: Tensor) -> None:
        self.device, self.rows, self.columns = coarse.device, rows, columns
        with torch.autocast(coarse.device.type, enabled=False):
            self.wide = (coarse + bias.to(coarse.dtype)[:, None, None]) @ columns  # (B, C, h, W)
        self.length, self.values = rows.shape[1], self.wide.shape[0] * self.wide.shape[1] * self.wide.shape[3]

    def cut(self, maps: Tensor, piece: slice) -> Tensor:
        return maps.reshape(*maps.shape[:-1], self.length, -1)[..., piece, :].flatten(-2).contiguous()

    def logits(self, piece: slice) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return (self.rows[:, piece].T @ self.wide).flatten(2)

    def no_gradients(self) -> list[Tensor]:
        return [torch.zeros_like(self.wide)]

    def add_gradients(self, piece: slice, gradient: Tensor, total: Sequence[Tensor]) -> None:
        with torch.autocast(self.device.type, enabled=False):
            maps = gradient.reshape(-1, len(self.rows[0, piece]), self.wide.shape[3])
            total[0].flatten(0, 1).baddbmm_(self.rows[:, piece].expand(len(maps), -1, -1), maps)

    def gradients(self, total: Sequence[Tensor]) -> list[Tensor]:
        with torch.autocast(self.device.type, enabled=False):
            coarse = (total[0] @ self.columns.T).flatten(2)
        return [coarse, coarse.sum(dim=(0, 2), dtype=torch.promote_types(coarse.dtype, torch.float32))]
