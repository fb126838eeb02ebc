"""Cross-consistency training: auxiliary decoders that see perturbed features are to agree with the main decoder (Ouali, Hudelot, Tami, CVPR 2020).

Shapes: U unlabelled images, C classes of the domain, D feature channels, H W image size, h w feature size, P pixels, in the
decoders' order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.model.consistency import auxiliary_losses
from multidomain_cct.model.decoders import Grid
from multidomain_cct.model.guides import Guide, objects_of
from multidomain_cct.model.losses import DISTANCES, CrossEntropy, at_least_float32, confident
from multidomain_cct.model.network import Segmenter, labelled_images


class CCT(Segmenter):
    """L = L_s + w_u L_u + w_w L_w, in every domain (CCT sections 3.1 to 3.4)."""

    def forward(self, batches: Mapping[str, Batch], progress: float = 1.0) -> dict[str, Tensor]:
        """The step's losses, `<domain>/<term>` -> scalar: their sum is optimised and they are what is logged. `progress` (0 to 1) decides the ramps.

        Gradients: main decoders learn from the supervised term only, auxiliary decoders from the other terms only, the encoder from all.
        """
        features = self.encode(labelled_images(batches) | {(name, "unlabelled"): batch.unlabelled for name, batch in batches.items()})
        losses = self.supervised_losses(features, batches, progress)
        for name, batch in batches.items():
            if (name, "unlabelled") in features and len(self.head(name).auxiliaries):
                losses |= self._unsupervised_losses(name, features[name, "unlabelled"], batch, progress)
        return losses

    def _unsupervised_losses(self, name: str, features: Tensor, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Consistency with the main decoder's prediction and, where the batch has pseudo-labels, agreement of the auxiliary decoders with them."""
        task, settings = self.tasks[name], self.tasks[name].consistency
        head, grid = self.head(name), Grid.drawn(settings.stride)
        with torch.no_grad():
            middles = head.main.pixels(features, Grid.middle(self.encoder.stride)).view(len(features), -1, *features.shape[2:])
            target = at_least_float32(head.main.pixels(features, grid)).softmax(dim=1)  # (U, C, P)
        counted = confident(target, head.main.in_order(batch.valid, grid), settings.confidence)
        terms = [DISTANCES[settings.distance](target, counted)]
        if batch.pseudo_labels is not None:
            terms.append(CrossEntropy(head.main.in_order(batch.pseudo_labels, grid), target.dtype))
        del target  # it is large, and the terms have what they need of it
        guide = Guide(objects_of(middles, batch.valid, task.things, self.encoder.stride))
        losses = auxiliary_losses(features, head.auxiliaries, guide, terms, sample=settings.sample, grid=grid)
        factor = task.weight * settings.ramp_at(progress)
        found = {f"{name}/consistency": factor * settings.weight_per_pixel(task.num_classes) * losses[0]}
        if batch.pseudo_labels is not None:
            found[f"{name}/weak"] = factor * settings.weak_weight * losses[1]
        return found
