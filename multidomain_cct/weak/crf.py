"""A dense conditional random field over the pixels of one image: mean field, in torch, on any device.

Energy: unary terms -log p, and between every two pixels a Potts penalty weighted by kernel(pixel i, pixel j), a sum of
two Gaussians: one of the positions ("smoothness"), one of positions and colours ("appearance"). Kraehenbuehl and Koltun
2011, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials".

Shapes: C classes, H W image size, N = H W pixels, d dimensions of the appearance kernel (2 positions, 3 colours), M
points of its lattice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.errors import require_number

_TINY = 1e-10
"""Smallest probability of a unary term: -log of 0 would exclude a class whatever surrounds the pixel."""


@dataclass(frozen=True)
class CrfSettings:
    """How pseudo-labels are drawn to the image's borders. The defaults are the paper's."""

    iterations: int = 10
    """Mean-field iterations; 0 leaves the probabilities as they are."""
    smooth_position: float = 3.0
    """Standard deviation of the smoothness kernel, in pixels."""
    smooth_weight: float = 3.0
    """Weight of the smoothness kernel; 0 leaves it out."""
    color_position: float = 50.0
    """Standard deviation of the appearance kernel in position, in pixels."""
    color_value: float = 5.0
    """Standard deviation of the appearance kernel in colour, in steps of 0 to 255."""
    color_weight: float = 10.0
    """Weight of the appearance kernel; 0 leaves it out."""

    def __post_init__(self) -> None:
        for name in ("iterations", "smooth_weight", "color_weight"):
            require_number(f"crf.{name}", getattr(self, name), at_least=0)
        # Smaller ones separate every pixel from every other, and cost a lattice point for each.
        for name in ("smooth_position", "color_position", "color_value"):
            require_number(f"crf.{name}", getattr(self, name), at_least=1)


class DenseCrf:
    """The kernels of one image, built once for any number of refinements.

    They are normalised as pydensecrf does by default (NORMALIZE_SYMMETRIC): with n = K 1, messages are K_ij / sqrt(n_i
    n_j). As there, a pixel's own term is part of the sum. Departures: the smoothness kernel is exact, where pydensecrf
    runs it through a lattice too; the lattice of the appearance kernel includes its gaps (see Lattice).
    """

    @torch.no_grad()
    def __init__(self, image: Tensor, settings: CrfSettings) -> None:
        """`image` is (3, H, W) uint8, on the device where the refinements run."""
        assert image.dtype == torch.uint8 and len(image) == 3
        self.settings = settings
        size, device = image.shape[1:], image.device
        self.smooth = Smoothness(size, settings.smooth_position, device) if settings.smooth_weight else None
        self.appearance = Lattice(appearance_features(image, settings)) if settings.color_weight else None

    @torch.no_grad()
    def __call__(self, probabilities: Tensor) -> Tensor:
        """(..., C, H, W) float32 probabilities after mean field, from (..., C, H, W) ones, each refined on its own."""
        unary = probabilities.float().clamp_min(_TINY).log()  # (..., C, H, W)
        belief = unary.softmax(dim=-3)
        for _ in range(self.settings.iterations):
            planes, score = belief.flatten(0, -3), unary.clone()
            if self.smooth is not None:
                score.add_(self.smooth(planes).view_as(score), alpha=self.settings.smooth_weight)
            if self.appearance is not None:
                # The lattice works on whole rows of classes, (N, C); softmax over a last dimension that short is ten
                # times slower than over the first.
                message = self.appearance(planes.flatten(1).T.contiguous()).T
                score.add_(message.reshape(score.shape), alpha=self.settings.color_weight)
            belief = score.softmax(dim=-3)
        return belief


def appearance_features(image: Tensor, settings: CrfSettings) -> Tensor:
    """(5, N) float32: column, row, red, green and blue of the pixels, over the appearance kernel's std."""
    rows, columns = torch.meshgrid(
        *(torch.arange(side, device=image.device) for side in image.shape[-2:]), indexing="ij"
    )
    positions = torch.stack([columns, rows]).flatten(1) / settings.color_position
    return torch.cat([positions, image.flatten(1).float() / settings.color_value])


class Smoothness:
    """The normalised Gaussian of the positions. It separates into rows and columns, and so does its normalisation."""

    CUTOFF = 5.0
    """Standard deviations beyond which the kernel is 0; there it has fallen to 4e-6 of its height."""

    def __init__(self, size: Sequence[int], std: float, device: torch.device) -> None:
        self.radius = math.ceil(self.CUTOFF * std)
        offsets = torch.arange(-self.radius, self.radius + 1, dtype=torch.float64)
        self.kernel = torch.exp(-0.5 * (offsets / std) ** 2).float().to(device)
        rows, columns = (self._blurred(torch.ones(1, length, 1, device=device))[0, :, 0] for length in size)
        self.scale = (rows[:, None] * columns).rsqrt()  # (H, W)

    def __call__(self, belief: Tensor) -> Tensor:
        """(C, H, W) filtered planes of (C, H, W) planes."""
        down = self._blurred(belief * self.scale)
        # Depthwise convolution along columns is ten times faster than along rows.
        across = self._blurred(down.transpose(1, 2).contiguous()).transpose(1, 2)
        return across * self.scale

    def _blurred(self, planes: Tensor) -> Tensor:
        kernel = self.kernel.view(1, 1, -1, 1).repeat(len(planes), 1, 1, 1)
        return F.conv2d(planes[None], kernel, padding=(self.radius, 0), groups=len(planes))[0]


class Lattice:
    """A Gaussian filter of std 1 over N points in d dimensions, symmetrically normalised, by a permutohedral lattice.

    Adams, Baek and Davis 2010. Each point lies in a simplex of d + 1 lattice points. Values are spread to these by
    barycentric weights, blurred with (1/2, 1, 1/2) along the d + 1 directions of the lattice, and gathered back. All
    three are weighted sums of rows, which is what `embedding_bag` does. The well-known version blurs among the points
    that values were spread to; here the gaps between two of them belong to the lattice too, which halves the error.
    """

    def __init__(self, features: Tensor) -> None:
        """`features` is (d, N), in standard deviations."""
        zero, rank, weights = _simplices(features)
        keys, strides = _vertex_keys(zero, rank)  # (d + 1, N)
        # Stable: the order of the sums depends on the image alone.
        ordered, order = keys.flatten().sort(stable=True)
        used, number, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
        vertices = _with_gaps(used, strides)
        row_of_used = torch.searchsorted(vertices, used)
        self.num_points, self.num_pixels = len(vertices), features.shape[1]
        # One row beyond the points stays 0: it stands in for neighbours that the lattice does not have.
        lengths = counts.new_zeros(self.num_points + 1).index_copy_(0, row_of_used, counts)
        self.spread_start = (lengths.cumsum(0) - lengths).int()
        self.spread_index = (order % self.num_pixels).int()
        self.spread_weight = weights.flatten()[order]
        row = torch.empty_like(number, dtype=torch.int32).index_copy_(0, order, row_of_used.int()[number])
        self.gather_index = row.view(-1, self.num_pixels).T.contiguous()  # (N, d + 1)
        self.gather_weight = weights.T.contiguous()
        self.neighbours = [_neighbours(vertices, step) for step in _steps(strides)]
        self.blur = features.new_tensor([0.5, 1.0, 0.5]).repeat(self.num_points + 1, 1)
        # The lattice's own constant factor drops out here.
        norm = self(features.new_ones(self.num_pixels, 1)).add_(1e-20).rsqrt_()[:, 0]
        self.gather_weight *= norm[:, None]
        self.spread_weight *= norm[self.spread_index]

    def __call__(self, values: Tensor) -> Tensor:
        """(N, C) filtered values of (N, C) values."""
        points = F.embedding_bag(
            self.spread_index, values, self.spread_start, mode="sum", per_sample_weights=self.spread_weight
        )  # (M + 1, C)
        for neighbours in self.neighbours:
            points = F.embedding_bag(neighbours, points, mode="sum", per_sample_weights=self.blur)
        return F.embedding_bag(self.gather_index, points, mode="sum", per_sample_weights=self.gather_weight)


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each point's simplex: remainder-0 vertex, ranks of the coordinates, barycentric weights, each (d + 1, N)."""
    d = len(features)
    # Rows of E span the plane whose coordinates sum to 0; scaled so that the blur's variance is 1.
    axes = torch.arange(1, d + 1, device=features.device, dtype=torch.float32)[:, None]
    scaled = features * ((d + 1) * (2 / 3) ** 0.5 / (axes * (axes + 1)).sqrt())
    later = scaled.flip(0).cumsum(0).flip(0)  # (d, N) sums of a coordinate and all behind it
    elevated = F.pad(later, (0, 0, 0, 1)) - F.pad(axes * scaled, (0, 0, 1, 0))  # (d + 1, N)
    zero = (elevated / (d + 1)).round() * (d + 1)
    difference = elevated - zero
    # The rank is the number of larger differences; of equal ones the first counts as larger. Sorting takes longer.
    rank = torch.stack(
        [(difference[:i] >= difference[i]).sum(0) + (difference[i + 1 :] > difference[i]).sum(0) for i in range(d + 1)]
    ).int()
    rank += (zero.sum(dim=0) / (d + 1)).round().int()
    shift = ((rank < 0).int() - (rank > d).int()) * (d + 1)
    rank += shift
    zero += shift
    ascending = ((elevated - zero) / (d + 1)).sort(dim=0).values
    weights = torch.cat([1 + ascending[:1] - ascending[-1:], ascending.diff(dim=0)])
    return zero.int(), rank, weights


def _vertex_keys(zero: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """(d + 1, N) int64 keys of the simplices' vertices, and the (d,) strides that make a key of d coordinates."""
    d = len(zero) - 1
    low = zero[:d].amin(dim=1) - 2 * (d + 1)
    span = (zero[:d].amax(dim=1) + 2 * (d + 1) - low + 1).long()
    assert span.double().log2().sum() < 62, "the features span more than 2^62 lattice cells"
    strides = torch.cat([span.new_ones(1), span.flip(0).cumprod(0)[:-1]]).flip(0)
    base = ((zero[:d] - low[:, None]) * strides[:, None]).sum(dim=0)  # (N,)
    # The vertex of remainder k adds k to every coordinate, less d + 1 where the coordinate's rank is above d - k.
    keys = [
        base + k * strides.sum() - ((rank[:d] > d - k) * (d + 1) * strides[:, None]).sum(dim=0) for k in range(d + 1)
    ]
    return torch.stack(keys), strides


def _steps(strides: Tensor) -> list[Tensor]:
    """The difference of a vertex's key and the next one's, for each of the lattice's d + 1 directions."""
    return [-strides.sum() + (len(strides) + 1) * stride for stride in (*strides, 0 * strides[0])]


def _with_gaps(vertices: Tensor, strides: Tensor) -> Tensor:
    """The sorted keys, and those with at least two of them as neighbours: a gap blurs one side into the other."""
    beside = torch.cat([vertices + sign * step for step in _steps(strides) for sign in (1, -1)])
    candidates, counts = torch.unique_consecutive(_sorted(beside), return_counts=True)
    joined: Tensor = torch.unique_consecutive(_sorted(torch.cat([vertices, candidates[counts > 1]])))
    return joined


def _sorted(keys: Tensor) -> Tensor:
    """The keys in order. On a CPU numpy sorts integers seven times faster than torch."""
    return torch.from_numpy(np.sort(keys.numpy())) if keys.device.type == "cpu" else keys.sort().values


def _neighbours(vertices: Tensor, step: Tensor) -> Tensor:
    """(M + 1, 3) int32: the vertex before, the vertex itself, the one behind; M where there is none."""
    num = len(vertices)
    rows = torch.arange(num + 1, device=vertices.device, dtype=torch.int32)
    next_row = torch.searchsorted(vertices, vertices + step, out_int32=True)
    exists = vertices[next_row.clamp_max(num - 1)] == vertices + step
    before, behind = torch.full_like(rows, num), torch.full_like(rows, num)
    behind[:num] = torch.where(exists, next_row, num)
    before[next_row[exists]] = rows[:num][exists]
    return torch.stack([before, rows, behind], dim=1)
