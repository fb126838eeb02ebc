"""Cross-consistency training: auxiliary decoders on perturbed features agree with the main decoder.

Ouali, Hudelot, Tami, CVPR 2020. Shapes: U unlabelled images, C classes of the domain, D feature channels, H W image
size, h w feature size, V W the axes of the pixels in the decoders' order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.data.domain import IGNORE
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.model.auxiliary import auxiliary_losses
from multidomain_cct.model.decoders import DecoderGroup, Grid
from multidomain_cct.model.distances import DISTANCES, at_least_float32
from multidomain_cct.model.losses import ConsistencySettings, PixelLoss, confident, pixel_cross_entropy
from multidomain_cct.model.network import labelled_images, unlabelled_images
from multidomain_cct.model.object_masks import ObjectMasks, objects_of


class CCT(Supervised):
    """L = L_s + w_u L_u + w_w L_w, in every domain (CCT sections 3.1 to 3.4)."""

    has_auxiliaries = True
    needs_auxiliaries = True

    @classmethod
    def wants_unlabelled(cls, consistency: ConsistencySettings, *, pseudo_labels: bool) -> bool:
        return consistency.weight > 0 or (pseudo_labels and consistency.weak_weight > 0)

    def forward(self, batches: Mapping[str, Batch], progress: float = 1.0) -> dict[str, Tensor]:
        """The step's losses. Main decoders learn from the supervised ones only, auxiliary ones from the others."""
        batches = self.with_labelled_views(batches)
        features = self.encode(labelled_images(batches) | unlabelled_images(batches))
        losses = self.supervised_losses(features, batches, progress)
        for name, batch in batches.items():
            if (name, "unlabelled") in features and len(self.head(name).auxiliaries):
                losses |= self._unsupervised_losses(name, features[name, "unlabelled"], batch, progress)
        return losses

    def _unsupervised_losses(self, name: str, features: Tensor, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Consistency of the auxiliary decoders with the main decoder's prediction and with pseudo-labels, if there are
        any.
        """
        task, settings = self.tasks[name], self.tasks[name].consistency
        head, grid = self.head(name), Grid.drawn(settings.stride)
        with torch.no_grad():
            main = DecoderGroup.of([head.main], grid)
            coarse = main.coarse(features[None])
            target = at_least_float32(main.logits(coarse)[0]).softmax(dim=1)  # (U, C, V W)
            middle = replace(main, grid=Grid.middle(self.encoder.stride)).logits(coarse)[0]
            middles = middle.view(*middle.shape[:2], *features.shape[2:])
        counted = confident(target, head.main.pixels(batch.valid, grid), settings.confidence)
        terms = [PixelLoss(DISTANCES[settings.distance], target, counted)]
        if batch.pseudo_labels is not None:
            ids = head.main.pixels(batch.pseudo_labels, grid)
            terms.append(PixelLoss(pixel_cross_entropy, ids, ids != IGNORE))
        objects = ObjectMasks(objects_of(middles, batch.valid, task.things, self.encoder.stride))
        losses = auxiliary_losses(features, head.auxiliaries, objects, terms, sample=settings.sample, grid=grid)
        factor = task.weight * settings.ramp_at(progress)
        unsupervised = {f"{name}/consistency": factor * settings.weight_per_pixel(task.num_classes) * losses[0]}
        if batch.pseudo_labels is not None:
            unsupervised[f"{name}/weak"] = factor * settings.weak_weight * losses[1]
        return unsupervised
