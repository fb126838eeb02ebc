"""Batch norms of several domains.

Shapes: B images, D feature channels, h w feature size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
        pieces = list(torch.split(features, list(counts)))
        # Statistics are taken over a domain's labelled and unlabelled images, which need not be neighbours.
        for name in dict.fromkeys(names):
            numbers = [number for number, other in enumerate(names) if other == name]
            normed = self.norms[name](torch.cat([pieces[number] for number in numbers]))
            for number, piece in zip(numbers, torch.split(normed, [counts[n] for n in numbers]), strict=True):
                pieces[number] = piece
        return torch.cat(pieces)


def split_batch_norms(module: nn.Module, domains: Sequence[str], segments: Segments) -> None:
    """Give every batch norm in the module one copy per domain, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, PerDomainNorm(child, domains, segments))
        else:
            split_batch_norms(child, domains, segments)
