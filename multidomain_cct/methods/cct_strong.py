"""CCT on strong views: a teacher predicts the weak view; main and auxiliary decoders learn it on a strong, mixed view.

The parts are known, their combination is new: the teacher is a running average (Tarvainen and Valpola 2017), the view
changes colour and sharpness and mixes images of the domain (French et al. 2020, Olsson et al. 2021), and the auxiliary
decoders see perturbed features of the strong view (CCT, Ouali et al. 2020).

Shapes: U unlabelled images, C classes of the domain, D feature channels, H W image size, h w feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.errors import require_choice, require_number
from multidomain_cct.methods.class_statistics import ClassStatistics
from multidomain_cct.methods.strong_view import strong_view
from multidomain_cct.methods.supervised import ClassHealth, Supervised, class_shares
from multidomain_cct.methods.teacher import warm_decay
from multidomain_cct.methods.views import Mix, Pasted, draw_classmix, draw_half_boxes, draw_rare_class
from multidomain_cct.model.auxiliary import auxiliary_losses
from multidomain_cct.model.decoders import DecoderGroup, Grid
from multidomain_cct.model.distances import DISTANCES, at_least_float32
from multidomain_cct.model.losses import ConsistencySettings, PixelLoss, confident, mean_over_valid
from multidomain_cct.model.network import labelled_images
from multidomain_cct.model.object_masks import ObjectMasks, objects_of


@dataclass(frozen=True)
class CCTStrongSettings:
    """For `method: cct_strong`. Its auxiliary decoders learn with weight, distance, confidence, ramp, sample and stride
    of `consistency`. A domain's own section replaces single keys.
    """

    decay: float = 0.99
    """Share of the teacher that a step keeps, 0 to below 1; smaller in the first steps."""
    weight: float = 1.0
    """Factor on the main decoder's loss on the strong view."""
    mix: str = "cutmix"
    """What is mixed into a strong view: `cutmix`, a rectangle of half the area; `classmix`, half of the classes of
    another image, as the teacher predicts them; `none`.
    """
    mix_probability: float = 1.0
    """Probability that an image is mixed."""
    paste: float = 0.0
    """Probability that the pixels of one class of a labelled image are pasted onto a strong view, with their labels;
    rare classes are chosen more often.
    """
    target: str = "hard"
    """What the main decoder learns: `hard`, the teacher's most probable class; `soft`, all its probabilities."""
    confidence: float = 0.9
    """Smallest probability of a confident pixel, 0 to below 1."""
    gate: str = "image"
    """What confidence decides: `image`, an image counts by its share of confident pixels (French et al. 2020); `pixel`,
    only confident pixels count.
    """
    thresholds: str = "class"
    """`fixed`: one confidence for all classes; `class`: confidence times the class's mean confidence over the largest
    of any class (after FlexMatch, Zhang et al. 2021), so that hard classes are not left out.
    """
    alignment: float = 0.5
    """How far the teacher's class shares are drawn toward the labelled ones, 0 to 1: probabilities are multiplied by
    the ratio of the two to this power; 1: ReMixMatch (Berthelot et al. 2020).
    """

    def __post_init__(self) -> None:
        require_number("cct_strong.decay", self.decay, at_least=0, below=1)
        require_number("cct_strong.weight", self.weight, at_least=0)
        require_choice("cct_strong.mix", self.mix, ("cutmix", "classmix", "none"))
        require_number("cct_strong.mix_probability", self.mix_probability, at_least=0, at_most=1)
        require_number("cct_strong.paste", self.paste, at_least=0, at_most=1)
        require_choice("cct_strong.target", self.target, ("hard", "soft"))
        require_number("cct_strong.confidence", self.confidence, at_least=0, below=1)
        require_choice("cct_strong.gate", self.gate, ("image", "pixel"))
        require_choice("cct_strong.thresholds", self.thresholds, ("fixed", "class"))
        require_number("cct_strong.alignment", self.alignment, at_least=0, at_most=1)


@dataclass(frozen=True)
class _StrongView:
    """What the student sees, and what it should predict there."""

    images: Tensor
    """(U, 3, H, W) uint8."""
    target: Tensor
    """(U, C, H, W) probabilities."""
    gate: Tensor
    """(U, H, W) bool: valid pixels that are confident enough."""
    valid: Tensor
    """(U, H, W) bool, False on padding."""

    def pasted(self, labelled: Tensor, pixels: Pasted) -> _StrongView:
        """The view with pixels of (B, 3, H, W) `labelled` images, whose classes are certain."""
        inside = pixels.inside.unsqueeze(1)
        certain = F.one_hot(pixels.classes, self.target.shape[1]).to(self.target)[:, :, None, None]  # (U, C, 1, 1)
        return _StrongView(
            torch.where(inside, labelled[pixels.donors], self.images),
            torch.where(inside, certain, self.target),
            self.gate | pixels.inside,
            self.valid | pixels.inside,
        )


class CCTStrong(Supervised):
    """L = L_s + L_main + w_u L_u in every domain; the teacher predicts and is what is evaluated."""

    settings_type = CCTStrongSettings
    has_auxiliaries = True
    has_own_teacher = True

    def __init__(self, *arguments: Any, settings: CCTStrongSettings, ema: None = None, **options: Any) -> None:
        super().__init__(*arguments, settings=settings, ema=settings.decay, **options)
        self.statistics = nn.ModuleDict({name: ClassStatistics(task.num_classes) for name, task in self.tasks.items()})

    @classmethod
    def wants_auxiliaries(cls, consistency: ConsistencySettings) -> bool:
        return consistency.weight > 0

    @staticmethod
    def mixing(settings: Any) -> float:
        return 0.0 if settings.mix == "none" else float(settings.mix_probability)

    def forward(self, batches: Mapping[str, Batch], progress: float = 1.0) -> dict[str, Tensor]:
        """The step's losses: supervised, `<domain>/strong` of the main decoder and `<domain>/consistency` of the
        auxiliary decoders.
        """
        batches = self.with_labelled_views(batches)
        views = {name: self._strong_view(name, batch) for name, batch in batches.items() if len(batch.unlabelled)}
        features = self.encode(
            labelled_images(batches) | {(name, "strong"): view.images for name, view in views.items()}
        )
        losses = self.supervised_losses(features, batches, progress)
        for name, view in views.items():
            losses[f"{name}/strong"] = self._main_loss(name, features[name, "strong"], view)
            if len(self.head(name).auxiliaries):
                losses[f"{name}/consistency"] = self._auxiliary_loss(name, features[name, "strong"], view, progress)
        return losses

    def after_step(self) -> None:
        super().after_step()
        for domain in self.tasks:
            self._statistics(domain).follow(decay=warm_decay(self._settings(domain).decay, int(self.updates)))

    def class_health(self, domain: str) -> list[ClassHealth]:
        labelled, statistics = class_shares(self.tasks[domain]), self._statistics(domain)
        kept = statistics.gated / statistics.predicted.clamp(min=1e-9)
        shares = zip(labelled.tolist(), statistics.predicted.tolist(), kept.tolist(), strict=True)
        return [ClassHealth(*each) for each in shares]

    @torch.no_grad()
    def _strong_view(self, domain: str, batch: Batch) -> _StrongView:
        """The strong view of a domain's unlabelled images, with the teacher's prediction for the weak view."""
        settings = self._settings(domain)
        probabilities = at_least_float32(self.logits(batch.unlabelled, domain)).softmax(dim=1)
        target = self._aligned(domain, probabilities)
        confidence, ids = target.max(dim=1)
        gate = batch.valid & (confidence >= self._thresholds(domain)[ids])
        self._statistics(domain).add(probabilities, target, gate, batch.valid)
        mix = _drawn(settings, ids, target.shape[1])
        view = _StrongView(mix(strong_view(batch.unlabelled)), mix(target), mix(gate), mix(batch.valid))
        if settings.paste and len(batch.images):
            pixels = draw_rare_class(batch.masks, len(ids), class_shares(self.tasks[domain]), settings.paste)
            return view.pasted(batch.images, pixels)
        return view

    def _main_loss(self, domain: str, features: Tensor, view: _StrongView) -> Tensor:
        settings = self._settings(domain)
        logits = at_least_float32(self.head(domain).main(features))
        target = view.target if settings.target == "soft" else view.target.argmax(dim=1)
        pixels = F.cross_entropy(logits, target, reduction="none")
        if settings.gate == "image":
            shares = view.gate.sum(dim=(1, 2)) / view.valid.sum(dim=(1, 2)).clamp(min=1)
            weights = shares.view(-1, 1, 1)
        else:
            weights = view.gate
        loss: Tensor = self.tasks[domain].weight * settings.weight * mean_over_valid(pixels * weights, view.valid)
        return loss

    def _auxiliary_loss(self, domain: str, features: Tensor, view: _StrongView, progress: float) -> Tensor:
        """Consistency of the auxiliary decoders, which see perturbed strong features, with the teacher."""
        task, settings, head = self.tasks[domain], self.tasks[domain].consistency, self.head(domain)
        grid = Grid.drawn(settings.stride)
        with torch.no_grad():
            group = replace(DecoderGroup.of([head.main]), grid=Grid.middle(self.encoder.stride))
            middle = group.logits(group.coarse(features[None]))[0]
        middles = middle.view(*middle.shape[:2], *features.shape[2:])
        objects = ObjectMasks(objects_of(middles, view.valid, task.things, self.encoder.stride))
        target = head.main.pixels(view.target, grid)
        counted = confident(target, head.main.pixels(view.valid, grid), settings.confidence)
        loss = PixelLoss(DISTANCES[settings.distance], target, counted)
        (value,) = auxiliary_losses(features, head.auxiliaries, objects, [loss], sample=settings.sample, grid=grid)
        factor = task.weight * settings.ramp_at(progress) * settings.weight_per_pixel(task.num_classes)
        total: Tensor = factor * value
        return total

    def _aligned(self, domain: str, probabilities: Tensor) -> Tensor:
        """(U, C, H, W) probabilities whose class shares are nearer to the labelled ones."""
        power, task = self._settings(domain).alignment, self.tasks[domain]
        if not power or not task.class_pixels:
            return probabilities
        # A class without labels is not pushed to nothing: it keeps a small share.
        labelled = class_shares(task).to(probabilities.device, non_blocking=True).clamp(min=1e-4)
        ratio = (labelled / self._statistics(domain).probability.clamp(min=1e-6)) ** power
        aligned = probabilities * ratio.clamp(0.1, 10).view(-1, 1, 1)
        return aligned / aligned.sum(dim=1, keepdim=True)

    def _thresholds(self, domain: str) -> Tensor:
        """(C,) confidence at which a pixel that is predicted as each class passes the gate."""
        settings, confidence = self._settings(domain), self._statistics(domain).confidence
        relative = confidence / confidence.max() if settings.thresholds == "class" else torch.ones_like(confidence)
        return settings.confidence * relative

    def _settings(self, domain: str) -> CCTStrongSettings:
        settings = self.tasks[domain].settings or self.settings
        assert isinstance(settings, CCTStrongSettings)
        return settings

    def _statistics(self, domain: str) -> ClassStatistics:
        statistics = self.statistics[domain]
        assert isinstance(statistics, ClassStatistics)
        return statistics


def _drawn(settings: CCTStrongSettings, ids: Tensor, num_classes: int) -> Mix:
    """How images with these (U, H, W) predicted ids are mixed."""
    if settings.mix == "classmix":
        return draw_classmix(ids, settings.mix_probability, num_classes)
    return draw_half_boxes(ids, settings.mix_probability if settings.mix == "cutmix" else 0.0)
