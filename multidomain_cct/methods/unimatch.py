"""UniMatch: two strong views and one view of perturbed features are to agree with the confident predictions of the weak
view (Yang et al., CVPR 2023).

Shapes: U unlabelled images, C classes of the domain, D feature channels, H W image size, h w feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.errors import UserError
from multidomain_cct.methods.views import CutMix, draw_cutmix, pseudo_labels, strong_view
from multidomain_cct.model.losses import mean_over_valid, pixel_cross_entropy
from multidomain_cct.model.network import Segmenter, labelled_images


@dataclass(frozen=True)
class UniMatchSettings:
    """Only `method: unimatch` reads them; its losses are cross-entropies without a ramp."""

    weight: float = 1.0
    """Factor on the unsupervised loss."""
    confidence: float = 0.95
    """Smallest probability at which a weak view's prediction becomes a pseudo-label, 0 to below 1."""
    dropout: float = 0.5
    """Share of the channels that the view of perturbed features loses, above 0 to below 1."""
    cutmix: float = 0.5
    """Probability that a strong view has a rectangle of another image."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise UserError(f"unimatch.weight is {self.weight}; it is 0 or more.")
        if not 0 <= self.confidence < 1:
            raise UserError(f"unimatch.confidence is {self.confidence}; it lies in 0 to below 1.")
        if not 0 < self.dropout < 1:
            raise UserError(f"unimatch.dropout is {self.dropout}; it lies between 0 and 1.")
        if not 0 <= self.cutmix <= 1:
            raise UserError(f"unimatch.cutmix is {self.cutmix}; a probability lies in 0 to 1.")


class UniMatch(Segmenter):
    """One model: it is its own teacher. All views go through the encoder in one pass."""

    def __init__(self, *arguments: Any, settings: UniMatchSettings, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.settings = settings

    def forward(self, batches: Mapping[str, Batch], progress: float = 1.0) -> dict[str, Tensor]:
        """The step's losses: supervised, and `<domain>/strong` and `<domain>/feature`, half of the unsupervised weight
        each.
        """
        mixes: dict[tuple[str, str], CutMix] = {}
        images = labelled_images(batches)
        for name, batch in batches.items():
            images[name, "weak"] = batch.unlabelled
            for view in ("first", "second"):
                mixes[name, view] = draw_cutmix(batch.unlabelled, probability=self.settings.cutmix)
                images[name, view] = mixes[name, view](strong_view(batch.unlabelled))
        features = self.encode(images)
        losses = self.supervised_losses(features, batches, progress)
        for name, batch in batches.items():
            if (name, "weak") in features:
                main, factor = self.head(name).main, self.tasks[name].weight * self.settings.weight / 2
                ids, confidence = pseudo_labels(self.target(features[name, "weak"], name))  # (U, H, W) each
                strong = [
                    self._agreement(main(features[name, view]), mix(ids), mix(confidence), mix(batch.valid))
                    for view in ("first", "second")
                    for mix in [mixes[name, view]]
                ]
                dropped = main(F.dropout2d(features[name, "weak"], self.settings.dropout, training=True))
                losses[f"{name}/strong"] = factor * (strong[0] + strong[1]) / 2
                losses[f"{name}/feature"] = factor * self._agreement(dropped, ids, confidence, batch.valid)
        return losses

    def _agreement(self, logits: Tensor, ids: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
        """Scalar: cross-entropy on the confident pixels, as a mean over all valid ones: the more are confident, the
        more the term weighs.
        """
        pixels = pixel_cross_entropy(logits, ids)
        return mean_over_valid(pixels * (confidence >= self.settings.confidence), valid)
