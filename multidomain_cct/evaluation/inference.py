"""Prediction of whole images: at once or by a sliding window, over scales and flips.

Shapes: B images, C classes of the domain, H W image size, H' W' size at which the answer is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.errors import UserError, require_number
from multidomain_cct.model.network import Segmenter, scaled


@dataclass(frozen=True)
class InferenceSettings:
    """How a whole image is predicted."""

    window: list[int] | None = None
    """[width, height] of a sliding window for larger images; none: the whole image at once."""
    overlap: float = 1 / 3
    """Share of the window that neighbours share, 0 to below 1."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """Image scales whose probabilities are averaged."""
    flip: bool = False
    """Average with the mirrored image."""
    batch: int = 1
    """Images of equal size that `evaluate` predicts at once; more fill a GPU with small images."""

    def __post_init__(self) -> None:
        if self.window is not None and (len(self.window) != 2 or min(self.window) < 1):
            raise UserError(f"evaluation.window is {self.window}; it is [width, height] in pixels.")
        require_number("evaluation.overlap", self.overlap, at_least=0, below=1)
        require_number("evaluation.batch", self.batch, at_least=1)
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"evaluation.scales is {self.scales}; it has at least one, each above 0.")

    @property
    def described(self) -> str:
        """The settings that change a score, in words."""
        view = "whole image" if self.window is None else f"window {self.window[0]}x{self.window[1]}"
        return view + (f", scales {self.scales}" if self.scales != [1.0] else "") + (", flip" if self.flip else "")


def class_probabilities(
    model: Segmenter, images: Tensor, domain: str, size: tuple[int, int], settings: InferenceSettings
) -> Tensor:
    """(B, C, H', W') class probabilities of (B, 3, H, W) uint8 images, at `size` = (H', W').

    Up to rounding, an image gets the same ones alone.
    """
    return mean_probabilities(view_logits(model, images, domain, settings), size)


def view_logits(model: Segmenter, images: Tensor, domain: str, settings: InferenceSettings) -> list[Tensor]:
    """(B, C, h, w) logits of the images at each scale, and of their mirror images, turned back."""
    views = []
    for scale in settings.scales:
        view = scaled(images, scale)
        views.append(_window_logits(model, view, domain, settings).float())
        if settings.flip:
            views.append(_window_logits(model, view.flip(-1), domain, settings).float().flip(-1))
    return views


def mean_probabilities(views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """(B, C, H', W') probabilities at `size` = (H', W'): the mean over the views of their logits."""
    total = torch.zeros((), device=views[0].device)
    for logits in views:
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        total = total + logits.softmax(dim=1)
    return total / len(views)


def _window_logits(model: Segmenter, images: Tensor, domain: str, settings: InferenceSettings) -> Tensor:
    """(B, C, H, W) logits, averaged where windows overlap."""
    height, width = images.shape[-2:]
    if settings.window is None or (width <= settings.window[0] and height <= settings.window[1]):
        return model.logits(images, domain)
    total = torch.zeros(len(images), model.tasks[domain].num_classes, height, width, device=images.device)
    seen = torch.zeros(1, 1, height, width, device=images.device)
    for top in _window_starts(height, settings.window[1], settings.overlap):
        for left in _window_starts(width, settings.window[0], settings.overlap):
            window = (..., slice(top, top + settings.window[1]), slice(left, left + settings.window[0]))
            total[window] += model.logits(images[window], domain).float()
            seen[window] += 1
    return total / seen


def _window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Starts of windows that cover the length, the last one flush with its end."""
    if length <= window:
        return [0]
    stride = max(1, round(window * (1 - overlap)))
    return [*range(0, length - window, stride), length - window]
