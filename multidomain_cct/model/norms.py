"""Batch norms of several domains.

Shapes: B images, D feature channels, h w feature size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Segments:
    """The domains of the images of the current batch, in order, for per-domain norms."""

    def __init__(self) -> None:
        self.parts: tuple[tuple[str, int], ...] = ()


class PerDomainNorm(nn.Module):
    """A batch norm with weights and statistics of its own for each domain."""

    def __init__(self, norm: nn.Module, domains: Sequence[str], segments: Segments) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: copy.deepcopy(norm) for name in domains})
        self.segments = segments

    def forward(self, features: Tensor) -> Tensor:
        names, counts = zip(*self.segments.parts, strict=True)
        # Some backbones norm (B n, D) tokens or windows, those of an image one after the other.
        rows = features.shape[0] // sum(counts)
        sizes = [count * rows for count in counts]
        pieces = list(torch.split(features, sizes))
        # Statistics are taken over a domain's labelled and unlabelled images, which need not be neighbours.
        for name in dict.fromkeys(names):
            numbers = [number for number, other in enumerate(names) if other == name]
            normed = self.norms[name](torch.cat([pieces[number] for number in numbers]))
            for number, piece in zip(numbers, torch.split(normed, [sizes[n] for n in numbers]), strict=True):
                pieces[number] = piece
        return torch.cat(pieces)


class FrozenBatchNorm1d(nn.BatchNorm1d):
    """Never in training mode. timm has the like for two dimensions only."""

    def train(self, mode: bool = True) -> FrozenBatchNorm1d:
        return super().train(False)


def split_batch_norms(module: nn.Module, domains: Sequence[str], segments: Segments) -> None:
    """Give every batch norm in the module one copy per domain, in place."""
    _replace(module, lambda norm: PerDomainNorm(norm, domains, segments))


def freeze_batch_norms(module: nn.Module) -> nn.Module:
    """The module with batch norms whose weights and statistics stay as they are."""

    def freeze(norm: _BatchNorm) -> nn.Module:
        frozen = FrozenBatchNorm1d(norm.num_features, norm.eps, affine=norm.affine)
        frozen.load_state_dict(norm.state_dict())
        return frozen.requires_grad_(False).train()

    module = freeze_batch_norm_2d(module)
    _replace(module, freeze)
    return module


def _replace(module: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, make(child))
        else:
            _replace(child, make)
