"""Mean teacher: the model agrees, on a strong view, with its teacher's prediction for the weak view (Tarvainen and
Valpola 2017).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.errors import require_number
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.methods.views import draw_strong_view
from multidomain_cct.model.distances import DISTANCES, at_least_float32
from multidomain_cct.model.losses import confident, mean_over_valid
from multidomain_cct.model.network import labelled_images


@dataclass(frozen=True)
class MeanTeacherSettings:
    """For `method: mean_teacher`; weight, distance, confidence and ramp are those of `consistency`."""

    decay: float = 0.99
    """Share of the teacher that a step keeps, 0 to below 1; smaller in the first steps."""
    cutmix: float = 0.5
    """Probability that a strong view contains a rectangle of another image (French et al. 2020)."""

    def __post_init__(self) -> None:
        require_number("mean_teacher.decay", self.decay, at_least=0, below=1)
        require_number("mean_teacher.cutmix", self.cutmix, at_least=0, at_most=1)


class MeanTeacher(Supervised):
    """The teacher is what predicts and what is evaluated."""

    settings_type = MeanTeacherSettings
    settings: MeanTeacherSettings
    has_own_teacher = True

    def __init__(self, *arguments: Any, settings: MeanTeacherSettings, ema: None = None, **options: Any) -> None:
        super().__init__(*arguments, settings=settings, ema=settings.decay, **options)

    @staticmethod
    def mixing(settings: Any) -> float:
        return float(settings.cutmix)

    def forward(self, batches: Mapping[str, Batch], progress: float = 1.0) -> dict[str, Tensor]:
        """The step's losses: supervised, and `<domain>/consistency` between the model's strong and the teacher's weak
        view.
        """
        batches = self.with_labelled_views(batches)
        views = {name: draw_strong_view(batch.unlabelled, self.settings.cutmix) for name, batch in batches.items()}
        features = self.encode(
            labelled_images(batches) | {(name, "strong"): images for name, (images, _) in views.items()}
        )
        losses = self.supervised_losses(features, batches, progress)
        for name, batch in batches.items():
            if (name, "strong") in features:
                task, settings, mix = self.tasks[name], self.tasks[name].consistency, views[name][1]
                with torch.no_grad():
                    target = mix(at_least_float32(self.logits(batch.unlabelled, name)).softmax(dim=1))
                counted = confident(target, mix(batch.valid), settings.confidence)
                logits = self.head(name).main(features[name, "strong"])
                distance = mean_over_valid(DISTANCES[settings.distance](logits, target), counted)
                weight = settings.weight_per_pixel(task.num_classes) * settings.ramp_at(progress)
                losses[f"{name}/consistency"] = task.weight * weight * distance
        return losses
