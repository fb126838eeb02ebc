"""Where the cluster assumption holds: whether features vary where classes meet (the diagnosis behind CCT, section 3.1
of the paper).

Each stage of an encoder is compared with the image cut into patches of the stage's stride. How well local variation
finds class borders is an area under the ROC curve (AUC): the probability that a position at a border varies more than
one inside a class; 0.5 is chance.

Shapes: D channels, H W image size, H' W' size of the labels, h w grid of whole patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multidomain_cct.data.batches.views import PAD, decode, image_tensor, mask_tensor
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError, require_choice, require_number
from multidomain_cct.model.encoder import Stages, encoder_stages, model_stages
from multidomain_cct.results.smoothness.variation import (
    Tally,
    area_under_curve,
    class_borders,
    image_patches,
    local_variation,
)
from multidomain_cct.results.trained_run import TrainedRun

BORDERS = ("labels", "prediction")
OUTPUT = "output"
"""Last stage of a run: the output of its context module."""
MOSTLY_BORDER = 0.9
"""A grid with a larger share of border positions has too few others to compare with: the verdict leaves it out."""


@dataclass(frozen=True)
class Stage:
    """One map of an encoder."""

    name: str
    stride: int
    channels: int


@dataclass(frozen=True)
class Subject:
    """The encoder that is diagnosed."""

    name: str
    stages: tuple[Stage, ...]
    features: Callable[[Tensor], Sequence[Tensor]]
    """From a (1, 3, H, W) uint8 image, H and W multiples of every stride, to the (1, D, h, w) features of each stage.
    """
    predict: Callable[[Tensor], Tensor] | None = None
    """From a (1, 3, H, W) uint8 image to (H, W) uint8 train ids; None for an encoder without a head."""
    device: torch.device = torch.device("cpu")


def published_encoder(name: str, weights: str, device: torch.device) -> Subject:
    """A timm model with the weights `none`, `timm`, `lite` or a file. Raises UserError as `model_stages` does."""
    levels = model_stages(name, weights).to(device)
    return Subject(f"{name}, weights {weights}", _stages(levels), levels, device=device)


def trained_encoder(run: TrainedRun, domain: str) -> Subject:
    """A run's backbone, stage by stage, then the output of its context module.

    Raises UserError when the run has no head for the domain.
    """
    model, device = run.model, run.device
    run.head(domain)
    encoder = model.encoder
    levels = encoder_stages(encoder, run.recipe.encoder, domain=domain, domains=run.domains).to(device)

    def features(image: Tensor) -> list[Tensor]:
        return [*levels(image), encoder(image, [(domain, 1)])]

    def predict(image: Tensor) -> Tensor:
        return model.logits(image, domain)[0].argmax(dim=0).to(torch.uint8)

    stages = (*_stages(levels), Stage(OUTPUT, encoder.stride, encoder.channels))
    return Subject(f"{run.folder.resolve().name}, {run.checkpoint.name}", stages, features, predict, device)


def _stages(levels: Stages) -> tuple[Stage, ...]:
    return tuple(
        Stage(f"stage {number}", stride, channels)
        for number, (stride, channels) in enumerate(zip(levels.strides, levels.channels, strict=True), start=1)
    )


@dataclass(frozen=True)
class Measured:
    """One stage on one image, and the image's patches of the same size."""

    stage: Stage
    features: Tensor
    """(h, w) local variation."""
    patches: Tensor
    """(h, w) local variation."""
    border: Tensor
    """(h, w) bool."""
    counted: Tensor
    """(h, w) bool: False where the patch holds ignored pixels only."""

    @cached_property
    def area(self) -> float | None:
        """AUC of the features, 0 to 1."""
        return area_under_curve(self.features[self.counted], self.border[self.counted])

    @cached_property
    def patch_area(self) -> float | None:
        """AUC of the patches, 0 to 1."""
        return area_under_curve(self.patches[self.counted], self.border[self.counted])

    def cpu(self) -> Measured:
        return Measured(self.stage, self.features.cpu(), self.patches.cpu(), self.border.cpu(), self.counted.cpu())


@torch.inference_mode()
def measure(subject: Subject, image: Tensor, *, ids: Tensor, num_classes: int) -> list[Measured]:
    """Each stage on one (3, H, W) uint8 image with (H', W') train ids.

    Positions whose patch is not whole are left out: they would show the padding.
    """
    height, width = image.shape[-2:]
    unit = math.lcm(*(stage.stride for stage in subject.stages))
    padded = torch.tensor(PAD, dtype=torch.uint8, device=image.device).view(3, 1, 1)
    padded = padded.repeat(1, -(-height // unit) * unit, -(-width // unit) * unit)
    padded[:, :height, :width] = image

    @cache
    def on_grid(stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Variation of the patches, borders, and which positions count."""
        variation = local_variation(image_patches(image, stride))
        return variation, *class_borders(ids, (height, width), stride=stride, num_classes=num_classes)

    result = []
    for stage, features in zip(subject.stages, subject.features(padded[None]), strict=True):
        whole = features[0, :, : height // stage.stride, : width // stage.stride]
        result.append(Measured(stage, local_variation(whole), *on_grid(stage.stride)))
    return result


@dataclass(frozen=True)
class StageScore:
    """How well a stage's local variation finds the class borders.

    AUCs are 0 to 1, and None where no image has both borders and insides on this grid.
    """

    name: str
    stride: int
    channels: int
    border_share: float
    """Share of the counted positions that are borders."""
    images: int
    """Images that have an AUC."""
    auc: float | None
    """Mean over the images."""
    pooled_auc: float | None
    """Of all images' positions together."""
    patch_auc: float | None
    """Of the image's patches of the same size: mean over the images."""
    patch_pooled_auc: float | None
    gain: float | None
    """auc less patch_auc."""
    gain_error: float | None
    """Standard error of the gain over the images; None for fewer than two."""


@dataclass(frozen=True)
class Example:
    """One image for the picture."""

    key: str
    image: np.ndarray
    """(H, W, 3) uint8."""
    ids: np.ndarray
    """(H', W') uint8 train ids whose borders count."""
    measured: tuple[Measured, ...]
    """On the CPU."""


@dataclass(frozen=True)
class Diagnosis:
    """The figures of one encoder on one split."""

    subject: str
    domain: Domain
    split: str
    borders: str
    """One of BORDERS."""
    images: int
    stages: tuple[StageScore, ...]

    @property
    def best(self) -> StageScore | None:
        """The stage that gains most over patches of its size; None when no stage can be judged."""
        usable = [score for score in self.stages if score.gain is not None and score.border_share <= MOSTLY_BORDER]
        return max(usable, key=lambda score: score.gain or 0.0, default=None)

    @property
    def verdict(self) -> str:
        """On which stage the cluster assumption holds best, in one or two sentences."""
        best = self.best
        left_out = "".join(
            f" Left out: {score.name}, where {100 * score.border_share:.0f} % of the positions are borders."
            for score in self.stages
            if score.border_share > MOSTLY_BORDER
        )
        if best is None or best.gain is None:
            return f"No stage can be judged: no grid has enough positions both at borders and inside classes.{left_out}"
        error = "" if best.gain_error is None else f", standard error {best.gain_error:.3f}"
        place = "the encoder's output" if best.name == OUTPUT else best.name
        figures = (
            f"{place}: its local variation finds class borders "
            f"with AUC {best.auc:.3f}, that of {best.stride} x {best.stride} image patches with {best.patch_auc:.3f} "
            f"(difference {best.gain:+.3f}{error}).{left_out}"
        )
        if best.gain > 2 * (best.gain_error or 0.0):
            return f"The cluster assumption holds best at {figures}"
        return f"At no stage do class borders stand out clearly more than in the image itself; nearest is {figures}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "subject": self.subject,
            "domain": self.domain.name,
            "split": self.split,
            "borders": self.borders,
            "images": self.images,
            "stages": [asdict(score) for score in self.stages],
            "best": self.best.name if self.best else None,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class DiagnosisSettings:
    """Which images are measured, and against which borders."""

    split: str = "val"
    borders: str | None = None
    """One of BORDERS; None takes the labels when the split has masks, else the prediction. With labels, images without
    a mask are left out.
    """
    limit: int | None = None
    """How many images are measured, the first of the shards; None: all."""
    examples: int = 0
    """How many of them are kept for a picture."""

    def __post_init__(self) -> None:
        if self.borders is not None:
            require_choice("--borders", self.borders, BORDERS)
        if self.limit is not None:
            require_number("--limit", self.limit, at_least=1)


def diagnose(
    subject: Subject,
    domain: Domain,
    *,
    shards: Shards,
    settings: DiagnosisSettings,
    progress: Callable[[Iterable[int], int], Iterable[int]] = lambda items, total: items,
) -> tuple[Diagnosis, list[Example]]:
    """The figures over the images of a split, one image at a time, and the first of them as examples.

    Raises UserError when there is nothing to take the borders from, and for features that are not finite.
    """
    labelled = shards.numbers(labelled=True).tolist()
    borders = _choose_borders(settings, subject, f"{domain.name}/{settings.split}", labelled=bool(labelled))
    numbers = (labelled if borders == "labels" else range(len(shards)))[: settings.limit]
    examples: list[Example] = []
    of_features, of_patches = ([Tally(subject.device) for _ in subject.stages] for _ in range(2))
    for number in progress(numbers, len(numbers)):
        record = shards.read(number, with_mask=borders == "labels")
        picture, mask = decode(record, domain)
        image = image_tensor(picture).to(subject.device)
        ids = _predicted(subject, image) if mask is None else mask_tensor(mask).to(subject.device)
        measured = measure(subject, image, ids=ids, num_classes=domain.num_classes)
        for result, features, patches in zip(measured, of_features, of_patches, strict=True):
            if not bool(result.features.isfinite().all()):
                raise UserError(
                    f"{record.shard}: key {record.key!r}: the features of {result.stage.name} are not finite. Use "
                    "another checkpoint or weights."
                )
            border = result.border[result.counted]
            features.add(result.features[result.counted], border, result.area)
            patches.add(result.patches[result.counted], border, result.patch_area)
        if len(examples) < settings.examples:
            kept = tuple(result.cpu() for result in measured)
            examples.append(Example(record.key, np.asarray(picture), ids.cpu().numpy(), kept))
    scores = tuple(map(_score, subject.stages, of_features, of_patches))
    return Diagnosis(subject.name, domain, settings.split, borders, len(numbers), scores), examples


def _choose_borders(settings: DiagnosisSettings, subject: Subject, where: str, *, labelled: bool) -> str:
    chosen = settings.borders or ("labels" if labelled else "prediction")
    if chosen == "labels" and not labelled:
        raise UserError(f"{where} has no masks. Name a labelled split, or a run with --borders prediction.")
    if chosen == "prediction" and subject.predict is None:
        reason = "--borders is prediction" if settings.borders else f"{where} has no masks"
        raise UserError(f"{reason}, but {subject.name} is an encoder without a head. Name a run, or a labelled split.")
    return chosen


@torch.inference_mode()
def _predicted(subject: Subject, image: Tensor) -> Tensor:
    assert subject.predict is not None
    return subject.predict(image[None])


def _score(stage: Stage, features: Tally, patches: Tally) -> StageScore:
    gains = np.subtract(features.areas, patches.areas)
    error = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None
    auc, patch_auc, gain = (
        float(np.mean(values)) if len(values) else None for values in (features.areas, patches.areas, gains)
    )
    return StageScore(
        **asdict(stage),
        border_share=features.border_share,
        images=len(gains),
        auc=auc,
        pooled_auc=features.pooled,
        patch_auc=patch_auc,
        patch_pooled_auc=patches.pooled,
        gain=gain,
        gain_error=error,
    )
