"""Mean teacher: a running average of the model predicts the weak view, the model itself the strong one (Tarvainen and
Valpola 2017).

Shapes: U unlabelled images, H W image size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.errors import UserError
from multidomain_cct.methods.views import draw_cutmix, strong_view
from multidomain_cct.model.distances import DISTANCES
from multidomain_cct.model.losses import at_least_float32, confident, mean_over_valid
from multidomain_cct.model.network import Segmenter, labelled_images, whole_image_logits


@dataclass(frozen=True)
class MeanTeacherSettings:
    """Only `method: mean_teacher` reads them; weight, distance, confidence and ramp are those of `consistency`."""

    decay: float = 0.99
    """Share of the teacher that stays at a step, 0 to below 1; in the first steps less, so that it forgets its random
    start.
    """
    cutmix: float = 0.5
    """Probability that a strong view has a rectangle of another image (French et al. 2020)."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"mean_teacher.decay is {self.decay}; it lies in 0 to below 1.")
        if not 0 <= self.cutmix <= 1:
            raise UserError(f"mean_teacher.cutmix is {self.cutmix}; a probability lies in 0 to 1.")


class MeanTeacher(Segmenter):
    """What is evaluated is the teacher."""

    updates: Tensor

    def __init__(self, *arguments: Any, settings: MeanTeacherSettings, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.settings = settings
        # One deep copy of both, so that what they share stays shared.
        self.teacher = copy.deepcopy(nn.ModuleDict({"encoder": self.encoder, "heads": self.heads})).requires_grad_(
            False
        )
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> MeanTeacher:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batches: Mapping[str, Batch], progress: float = 1.0) -> dict[str, Tensor]:
        """The step's losses: supervised, and `<domain>/consistency` of the model's strong view with the teacher's weak
        one.
        """
        if not self.updates:
            # The model may have been given weights since the teacher was copied from it.
            self._follow(decay=0.0)
        mixes = {
            name: draw_cutmix(batch.unlabelled, probability=self.settings.cutmix) for name, batch in batches.items()
        }
        strong = {(name, "strong"): mixes[name](strong_view(batch.unlabelled)) for name, batch in batches.items()}
        features = self.encode(labelled_images(batches) | strong)
        losses = self.supervised_losses(features, batches, progress)
        for name, batch in batches.items():
            if (name, "strong") in features:
                task, settings, mix = self.tasks[name], self.tasks[name].consistency, mixes[name]
                with torch.no_grad():
                    target = mix(at_least_float32(self.logits(batch.unlabelled, name)).softmax(dim=1))
                counted = confident(target, mix(batch.valid), settings.confidence)
                logits = self.head(name).main(features[name, "strong"])
                distance = mean_over_valid(DISTANCES[settings.distance](logits, target), counted)
                weight = settings.weight_per_pixel(task.num_classes) * settings.ramp_at(progress)
                losses[f"{name}/consistency"] = task.weight * weight * distance
        return losses

    def logits(self, images: Tensor, domain: str) -> Tensor:
        """The teacher's (B, C, H, W) logits."""
        head = self.teacher["heads"].get_submodule(self.tasks[domain].head or domain)
        return whole_image_logits(self.teacher["encoder"], head.get_submodule("main"), images, domain)

    def after_step(self) -> None:
        """Move the teacher toward the model, running statistics too."""
        self.updates += 1
        self._follow(decay=min(self.settings.decay, 1 - 1 / (int(self.updates) + 1)))

    @torch.no_grad()
    def _follow(self, *, decay: float) -> None:
        own = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        own |= {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        for name, tensor in self.teacher.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(own[name], 1 - decay)
            else:
                tensor.copy_(own[name])
