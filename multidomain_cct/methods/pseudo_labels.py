"""Pseudo-labels: the most probable classes of one view, as targets of another.

Shapes: U unlabelled images, C classes of the domain, H W image size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from multidomain_cct.methods.views import Mix
from multidomain_cct.model.distances import at_least_float32
from multidomain_cct.model.losses import mean_over_valid, pixel_cross_entropy


@dataclass(frozen=True)
class PseudoLabels:
    """What a prediction teaches, pixel by pixel."""

    ids: Tensor
    """(U, H, W) train ids."""
    confidence: Tensor
    """(U, H, W) probability of that class, in 32 bits or more."""
    valid: Tensor
    """(U, H, W) bool, False on padding."""

    @classmethod
    def of(cls, probabilities: Tensor, valid: Tensor) -> PseudoLabels:
        """The most probable class of (U, C, H, W) probabilities."""
        confidence, ids = at_least_float32(probabilities).max(dim=1)
        return cls(ids, confidence, valid)

    def mixed(self, mix: Mix) -> PseudoLabels:
        """The pseudo-labels of images that were mixed in the same way."""
        return PseudoLabels(mix(self.ids), mix(self.confidence), mix(self.valid))

    def cross_entropy(self, logits: Tensor, threshold: float) -> Tensor:
        """Scalar: cross-entropy of (U, C, H, W) logits on pixels of at least this confidence, averaged over all valid
        pixels: the more pixels are confident, the more the loss weighs (UniMatch).
        """
        pixels = pixel_cross_entropy(logits, self.ids)
        return mean_over_valid(pixels * (self.confidence >= threshold), self.valid)
