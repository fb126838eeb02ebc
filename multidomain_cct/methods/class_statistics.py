"""What a teacher predicts of each class, as running means: for thresholds, alignment, and an eye on its health.

Shapes: U unlabelled images, C classes of the domain, H W image size.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn


class ClassStatistics(nn.Module):
    """Running means over the valid pixels of a domain's unlabelled images, equal in all processes."""

    probability: Tensor
    """(C,) mean probability of each class: the share of the pixels that the teacher expects of it."""
    confidence: Tensor
    """(C,) mean confidence of the pixels that are predicted as each class."""
    predicted: Tensor
    """(C,) share of the pixels that are predicted as each class."""
    gated: Tensor
    """(C,) share of the pixels that are predicted as each class and pass the gate."""
    pending: Tensor
    """(5, C) sums of this step: all pixels, probability, confidence of the predicted class, predicted, gated pixels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        uniform = torch.full((num_classes,), 1 / num_classes)
        self.register_buffer("probability", uniform)
        self.register_buffer("confidence", uniform.clone())
        self.register_buffer("predicted", uniform.clone())
        self.register_buffer("gated", torch.zeros(num_classes))
        self.register_buffer("pending", torch.zeros(5, num_classes))

    @torch.no_grad()
    def add(self, probabilities: Tensor, target: Tensor, gate: Tensor, valid: Tensor) -> None:
        """Count (U, C, H, W) probabilities as the teacher gives them, and as targets, where (U, H, W) `valid`.

        `gate`, (U, H, W): the pixels that are confident enough.
        """
        count = probabilities.shape[1]
        confidence, ids = target.max(dim=1)
        ids = ids.where(valid, count).flatten()

        def per_class(values: Tensor) -> Tensor:
            return torch.zeros(count + 1, dtype=values.dtype, device=ids.device).index_add_(0, ids, values.flatten())[
                :count
            ]

        ones = torch.ones_like(confidence)
        sums = [
            valid.sum().expand(count),
            (probabilities * valid.unsqueeze(1)).sum(dim=(0, 2, 3)),
            per_class(confidence),
            per_class(ones),
            per_class(gate.to(ones.dtype)),
        ]
        self.pending += torch.stack([each.float() for each in sums])

    @torch.no_grad()
    def follow(self, *, decay: float) -> None:
        """Move the running means toward what was counted since the last call, in all processes; `decay` is kept."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.pending)
        pixels, probability, confidence, predicted, gated = self.pending
        some = pixels > 0
        share = pixels.clamp(min=1)
        for name, value, moves in (
            ("probability", probability / share, some),
            ("confidence", confidence / predicted.clamp(min=1), predicted > 0),
            ("predicted", predicted / share, some),
            ("gated", gated / share, some),
        ):
            mean = self.get_buffer(name)
            mean.copy_(torch.where(moves, mean.lerp(value, 1 - decay), mean))
        self.pending.zero_()
