"""Distances of a decoder's predictions from target probabilities, per pixel.

Each is `(logits, target) -> value per pixel`: (..., B, C, H, W) logits and (B, C, H, W) probabilities give
(..., B, H, W) values, in 32 bits or more. A distance is a sum over classes; the target is a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def squared_distance(logits: Tensor, target: Tensor) -> Tensor:
    """Squared Euclidean distance of softmax(logits) from the target, between 0 and 2.

    The authors also average over classes, so that the same weight counts less in a domain of many classes.
    """
    prediction = at_least_float32(logits).softmax(dim=-3)
    return F.mse_loss(prediction, target.expand_as(prediction), reduction="none").sum(dim=-3)


def kl_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || softmax(logits)) in nats, 0 or more.

    The authors' masked and unmasked forms differ by a factor C; this is the textbook one.
    """
    log_prediction = at_least_float32(logits).log_softmax(dim=-3)
    return F.kl_div(log_prediction, target.expand_as(log_prediction), reduction="none").sum(dim=-3)


def jensen_shannon(logits: Tensor, target: Tensor) -> Tensor:
    """Jensen-Shannon divergence of softmax(logits) and target in nats: symmetric, between 0 and ln 2.

    It is the mean of both divergences *from* their mixture; the authors' code takes those *of* the mixture, which have
    no bound.
    """
    log_prediction = at_least_float32(logits).log_softmax(dim=-3)
    prediction = log_prediction.exp()
    # Where both probabilities underflow, the logarithm must stay finite for 0 * log 0 to be 0.
    log_mixture = ((prediction + target) / 2).clamp(min=torch.finfo(prediction.dtype).tiny).log()
    pixels = prediction * (log_prediction - log_mixture) + torch.xlogy(target, target) - target * log_mixture
    return pixels.sum(dim=-3) / 2


DISTANCES: dict[str, Distance] = {"mse": squared_distance, "kl": kl_divergence, "js": jensen_shannon}
"""By name in the recipe."""


def at_least_float32(logits: Tensor) -> Tensor:
    """The logits in 32 bits or more."""
    return logits.float() if logits.itemsize < 4 else logits
