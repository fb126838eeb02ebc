"""Batch norms of several domains.

Shapes: B images, D feature channels, h w feature size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Segments:
    """Which domain the images of the batch in hand are of, in order; per-domain norms read it."""

    def __init__(self) -> None:
        self.parts: tuple[tuple[str, int], ...] = ()


class PerDomainNorm(nn.Module):
    """A batch norm with weights and statistics of its own for each domain."""

    def __init__(self, norm: nn.Module, domains: Sequence[str], segments: Segments) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: copy.deepcopy(norm) for name in domains})
        self.segments = segments

    def forward(self, features: Tensor) -> Tensor:
        parts = self.segments.parts
        pieces = torch.split(features, [count for _, count in parts])
        # A domain's labelled and unlabelled images may stand apart; its statistics are taken over both.
        joined: dict[str, list[Tensor]] = {}
        for (name, _), piece in zip(parts, pieces, strict=True):
            joined.setdefault(name, []).append(piece)
        normed = {
            name: iter(torch.split(self.norms[name](torch.cat(own)), [len(piece) for piece in own]))
            for name, own in joined.items()
        }
        return torch.cat([next(normed[name]) for name, _ in parts])


def split_batch_norms(module: nn.Module, domains: Sequence[str], segments: Segments) -> None:
    """Give every batch norm in the module one copy per domain, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, PerDomainNorm(child, domains, segments))
        else:
            split_batch_norms(child, domains, segments)
