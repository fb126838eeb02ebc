"""Learning from labelled images. Every method adds its losses on unlabelled images to this one.

Shapes: B labelled images, C classes of the domain, D feature channels, H W image size, h w feature size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.data.domain import IGNORE
from multidomain_cct.methods.strong_view import strong_view
from multidomain_cct.methods.teacher import Teacher, warm_decay
from multidomain_cct.methods.views import draw_half_boxes
from multidomain_cct.model.auxiliary import decoder_losses
from multidomain_cct.model.decoders import Decoder
from multidomain_cct.model.distances import at_least_float32
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.losses import (
    ConsistencySettings,
    PixelLoss,
    SupervisedSettings,
    ab_threshold,
    bootstrapped_cross_entropy,
    pixel_cross_entropy,
)
from multidomain_cct.model.network import Features, Segmenter, Task, labelled_images


@dataclass(frozen=True)
class ClassHealth:
    """What a domain's unlabelled images teach of one class: shares of their pixels, 0 to 1."""

    labelled: float
    """Share of the class in the labelled pixels."""
    predicted: float
    """Share of the pixels that the teacher predicts as the class."""
    kept: float
    """Share of these that are confident enough to be learnt."""

    @property
    def vanishes(self) -> bool:
        """Whether the class has labels, and hardly any target."""
        return self.labelled > 0 and self.predicted < 0.1 * self.labelled


class Supervised(Segmenter):
    """Learns from labelled images only (`method: supervised`). A method is a subclass that adds losses on unlabelled
    images and says here what it needs of a recipe.
    """

    settings_type: ClassVar[type[Any] | None] = None
    """The dataclass of the method's own section in the recipe."""
    has_auxiliaries: ClassVar[bool] = False
    """Whether heads that see unlabelled images get auxiliary decoders."""
    needs_auxiliaries: ClassVar[bool] = False
    """Whether unlabelled images are of no use without auxiliary decoders."""
    needs_unlabelled: ClassVar[bool] = False
    """Whether a run without unlabelled images would leave parameters untrained."""
    has_own_teacher: ClassVar[bool] = False
    """Whether the method keeps a running average of its own, so that the recipe's `ema` has no place."""
    min_label_spaces: ClassVar[int] = 1
    updates: Tensor

    def __init__(
        self,
        encoder: EncoderSettings,
        tasks: Mapping[str, Task],
        *,
        decoder: str = "pixelshuffle",
        seed: int = 0,
        settings: Any = None,
        ema: float | None = None,
    ) -> None:
        """`settings` has the `settings_type`; `ema` is the decay of a running average of the weights, which then
        predicts; None keeps none. Raises UserError when encoder, stride and decoder do not fit.
        """
        super().__init__(encoder, tasks, decoder=decoder, seed=seed)
        self.settings = settings
        self.decay = ema
        self.teacher = None if ema is None else Teacher(self)
        self.predicts_as_student = False
        if self.teacher is not None:
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
            self.register_load_state_dict_post_hook(_teach_loaded_weights)  # type: ignore[no-untyped-call]

    @classmethod
    def wants_unlabelled(cls, consistency: ConsistencySettings, *, pseudo_labels: bool) -> bool:
        """Whether a domain with these settings learns from unlabelled images; `pseudo_labels`: whether it has some."""
        return cls is not Supervised

    @classmethod
    def wants_auxiliaries(cls, consistency: ConsistencySettings) -> bool:
        """Whether a domain with these settings trains auxiliary decoders, if it has unlabelled images."""
        return cls.has_auxiliaries

    @staticmethod
    def mixing(settings: Any) -> float:
        """Probability that unlabelled images are mixed with others of their micro-batch."""
        return 0.0

    def forward(self, batches: Mapping[str, Batch], progress: float = 1.0) -> dict[str, Tensor]:
        """The step's losses, `<domain>/<term>` -> scalar: their sum is optimised, and each is logged.

        `progress`, the share of the run that is done (0 to 1), sets the ramps.
        """
        batches = self.with_labelled_views(batches)
        return self.supervised_losses(self.encode(labelled_images(batches)), batches, progress)

    def after_step(self) -> None:
        """Called after each optimiser step that was not skipped."""
        if self.teacher is not None and self.decay is not None:
            self.updates += 1
            self.teacher.follow(self, decay=warm_decay(self.decay, int(self.updates)))

    def class_health(self, domain: str) -> list[ClassHealth]:
        """What the unlabelled images teach of each class, lately; empty for methods without a teacher's targets."""
        return []

    def with_labelled_views(self, batches: Mapping[str, Batch]) -> dict[str, Batch]:
        """The batches with the labelled images as `supervised.colour` and `supervised.cutmix` change them."""
        return {name: _labelled_view(batch, self.tasks[name].supervised) for name, batch in batches.items()}

    def supervised_losses(self, features: Features, batches: Mapping[str, Batch], progress: float) -> dict[str, Tensor]:
        """`<domain>/supervised` for every domain with labelled images in the step."""
        losses = {}
        for name, batch in batches.items():
            if (name, "labelled") in features:
                task, main = self.tasks[name], self.head(name).main
                loss = supervised_loss(main, features[name, "labelled"], batch.masks, task, progress)
                losses[f"{name}/supervised"] = task.weight * loss
        return losses

    def logits(self, images: Tensor, domain: str) -> Tensor:
        """(B, C, H, W) logits for (B, 3, H, W) uint8 images of any size: the running average's, if there is one."""
        if self.teacher is None or self.predicts_as_student:
            return super().logits(images, domain)
        return self.teacher.logits(images, domain, self.tasks[domain].head or domain)

    @contextmanager
    def as_student(self) -> Iterator[None]:
        """Within it, the weights that are trained predict, not their running average."""
        self.predicts_as_student = True
        try:
            yield
        finally:
            self.predicts_as_student = False

    @torch.no_grad()
    def target(self, features: Tensor, domain: str) -> Tensor:
        """(U, C, H, W) class probabilities of the main decoder, in 32 bits or more, without gradient."""
        return at_least_float32(self.head(domain).main(features)).softmax(dim=1)


def supervised_loss(decoder: Decoder, features: Tensor, masks: Tensor, task: Task, progress: float) -> Tensor:
    """Scalar: the task's loss of (B, D, h, w) features on (B, H, W) train ids, at `progress` (0 to 1) of the run."""
    if task.supervised.loss == "ab_ce":
        # Not in pieces: which pixels count depends on all of them.
        logits = decoder(features)
        return bootstrapped_cross_entropy(logits, masks, ab_threshold(task.supervised, logits.shape[1], progress))
    ids = decoder.pixels(masks)
    return decoder_losses(features, decoder, [PixelLoss(pixel_loss(task, masks.device), ids, ids != IGNORE)])[0]


def pixel_loss(task: Task, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The cross-entropy per pixel, with the domain's class weights and logit adjustment."""
    weights, shift = class_weights(task), task.supervised.logit_adjustment
    if weights is None and not shift:
        return pixel_cross_entropy
    return partial(
        pixel_cross_entropy,
        weights=None if weights is None else weights.to(device, non_blocking=True),
        shift=shift * class_shares(task).clamp(min=1e-4).log().to(device, non_blocking=True) if shift else None,
    )


def class_shares(task: Task) -> Tensor:
    """(C,) share of each class in the labelled pixels; equal shares when they are not known."""
    pixels = torch.tensor(task.class_pixels or (1,) * task.num_classes, dtype=torch.float32)
    return pixels / pixels.sum().clamp(min=1)


def class_weights(task: Task) -> Tensor | None:
    """(C,) weights of the classes, 1 on average over the labelled pixels; None when all count the same.

    A class without pixels has weight 0, which no pixel gets.
    """
    kind, pixels = task.supervised.class_weights, torch.tensor(task.class_pixels, dtype=torch.float64)
    if kind == "none" or not pixels.sum() > 0:
        return None
    if kind == "effective":
        # Cui et al., CVPR 2019, with beta = 1 - 1/N: a class counts as N (1 - exp(-n/N)) pixels.
        counts = pixels.sum() * -torch.expm1(-pixels / pixels.sum())
    else:
        counts = pixels
    weights = torch.where(pixels > 0, 1 / counts.clamp(min=1), 0.0)
    # A class of a handful of pixels would drown the others.
    weights = weights.clamp(max=20 * weights[pixels > 0].min())
    return (weights / ((weights * pixels).sum() / pixels.sum())).float()


def _labelled_view(batch: Batch, settings: SupervisedSettings) -> Batch:
    images, masks = batch.images, batch.masks
    if settings.colour and len(images):
        # Drawn on the CPU and copied without waiting for the device.
        chosen = (torch.rand(len(images)) < settings.colour).nonzero().flatten().to(images.device, non_blocking=True)
        images = images.index_copy(0, chosen, strong_view(images[chosen]))
    if settings.cutmix and len(images) > 1:
        mix = draw_half_boxes(images, settings.cutmix)
        images, masks = mix(images), mix(masks)
    return replace(batch, images=images, masks=masks)


def _teach_loaded_weights(model: Supervised, _: object) -> None:
    """Before the first update, weights that the model is given (init_from) are its teacher's too."""
    if model.teacher is not None and not model.updates:
        model.teacher.follow(model, decay=0.0)
