"""UniMatch: two strong views and a view of perturbed features agree with the confident predictions for the weak view
(Yang et al., CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.errors import require_number
from multidomain_cct.methods.pseudo_labels import PseudoLabels
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.methods.views import Mix, draw_strong_view
from multidomain_cct.model.network import labelled_images

VIEWS = ("first", "second")


@dataclass(frozen=True)
class UniMatchSettings:
    """For `method: unimatch`; its losses are cross-entropies without a ramp."""

    weight: float = 1.0
    """Factor on the unsupervised losses."""
    confidence: float = 0.95
    """Smallest probability at which a weak view's prediction becomes a pseudo-label, 0 to below 1."""
    dropout: float = 0.5
    """Share of the feature channels that are zeroed in the view of perturbed features, above 0 to below 1."""
    cutmix: float = 0.5
    """Probability that a strong view contains a rectangle of another image."""

    def __post_init__(self) -> None:
        require_number("unimatch.weight", self.weight, at_least=0)
        require_number("unimatch.confidence", self.confidence, at_least=0, below=1)
        require_number("unimatch.dropout", self.dropout, above=0, below=1)
        require_number("unimatch.cutmix", self.cutmix, at_least=0, at_most=1)


class UniMatch(Supervised):
    """The model is its own teacher; all views go through the encoder in one pass."""

    settings_type = UniMatchSettings
    settings: UniMatchSettings

    @staticmethod
    def mixing(settings: Any) -> float:
        return float(settings.cutmix)

    def forward(self, batches: Mapping[str, Batch], progress: float = 1.0) -> dict[str, Tensor]:
        """The step's losses: supervised, `<domain>/strong` and `<domain>/feature`; the latter two share the
        unsupervised weight.
        """
        batches = self.with_labelled_views(batches)
        mixes: dict[tuple[str, str], Mix] = {}
        images = labelled_images(batches)
        for name, batch in batches.items():
            images[name, "weak"] = batch.unlabelled
            for view in VIEWS:
                images[name, view], mixes[name, view] = draw_strong_view(batch.unlabelled, self.settings.cutmix)
        features = self.encode(images)
        losses = self.supervised_losses(features, batches, progress)
        threshold = self.settings.confidence
        for name, batch in batches.items():
            if (name, "weak") in features:
                main, factor = self.head(name).main, self.tasks[name].weight * self.settings.weight / 2
                labels = PseudoLabels.of(self.target(features[name, "weak"], name), batch.valid)
                first, second = (
                    labels.mixed(mixes[name, view]).cross_entropy(main(features[name, view]), threshold)
                    for view in VIEWS
                )
                dropped = main(F.dropout2d(features[name, "weak"], self.settings.dropout, training=True))
                losses[f"{name}/strong"] = factor * (first + second) / 2
                losses[f"{name}/feature"] = factor * labels.cross_entropy(dropped, threshold)
        return losses
