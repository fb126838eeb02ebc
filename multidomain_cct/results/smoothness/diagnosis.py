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
from dataclasses import asdict, dataclass, field
from functools import cache
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multidomain_cct.data.batches.views import PAD, decode, image_tensor, mask_tensor
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError
from multidomain_cct.model.stages import Stages, encoder_stages, model_stages
from multidomain_cct.results.smoothness.variation import area_under_curve, class_borders, image_patches, local_variation
from multidomain_cct.results.trained_run import TrainedRun

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
    """From a (1, 3, H, W) uint8 image, H and W multiples of `unit` and of every stride, to the (1, D, h, w) features of
    each stage.
    """
    unit: int = 1
    predict: Callable[[Tensor], Tensor] | None = None
    """From a (1, 3, H, W) uint8 image to (H, W) uint8 train ids; None for an encoder without a head."""
    device: torch.device = torch.device("cpu")


def published_encoder(name: str, weights: str, device: torch.device) -> Subject:
    """A timm model with the weights `none`, `timm`, `lite` or a file. Raises UserError as `model_stages` does."""
    levels = model_stages(name, weights).to(device)
    return Subject(f"{name}, weights {weights}", _stages(levels), levels, levels.plan.unit, device=device)


def trained_encoder(run: TrainedRun, domain: str) -> Subject:
    """A run's backbone, stage by stage, then the output of its context module.

    Raises UserError when the run has no head for the domain.
    """
    run.head(domain)
    model, encoder = run.model, run.model.encoder
    levels = encoder_stages(encoder, run.recipe.encoder, domain=domain, domains=run.domains).to(run.device)
    return Subject(
        name=f"{run.folder.resolve().name}, {run.checkpoint.name}",
        stages=(*_stages(levels), Stage(OUTPUT, encoder.stride, encoder.channels)),
        features=lambda image: [*levels(image), encoder(image, [(domain, 1)])],
        predict=lambda image: model.logits(image, domain)[0].argmax(dim=0).to(torch.uint8),
        device=run.device,
    )


def _stages(levels: Stages) -> tuple[Stage, ...]:
    sizes = zip(levels.strides, levels.channels, strict=True)
    return tuple(Stage(f"stage {number}", *size) for number, size in enumerate(sizes, start=1))


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
    area: float | None
    """AUC of the features, 0 to 1."""
    patch_area: float | None
    """AUC of the patches, 0 to 1."""


@torch.inference_mode()
def measure(subject: Subject, image: Tensor, *, ids: Tensor, num_classes: int) -> list[Measured]:
    """Each stage on one (3, H, W) uint8 image with (H', W') train ids.

    Positions whose patch is not whole are left out: they would show the padding.
    """
    height, width = image.shape[-2:]
    unit = math.lcm(subject.unit, *(stage.stride for stage in subject.stages))
    padded = torch.tensor(PAD, dtype=torch.uint8, device=image.device).view(3, 1, 1)
    padded = padded.repeat(1, -(-height // unit) * unit, -(-width // unit) * unit)
    padded[:, :height, :width] = image

    @cache
    def on_grid(stride: int) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """Variation of the patches, borders, which positions count, and the patches' AUC."""
        variation = local_variation(image_patches(image, stride))
        border, counted = class_borders(ids, (height, width), stride=stride, num_classes=num_classes)
        return variation, border, counted, area_under_curve(variation[counted], border[counted])

    result = []
    for stage, features in zip(subject.stages, subject.features(padded[None]), strict=True):
        variation = local_variation(features[0, :, : height // stage.stride, : width // stage.stride])
        patches, border, counted, patch_area = on_grid(stage.stride)
        area = area_under_curve(variation[counted], border[counted])
        result.append(Measured(stage, variation, patches, border, counted, area, patch_area))
    return result


@dataclass(frozen=True)
class StageScore(Stage):
    """How well a stage's local variation finds the class borders.

    AUCs are 0 to 1, and None where no image has both borders and insides on this grid.
    """

    border_share: float
    """Share of the counted positions that are borders."""
    images: int
    """Images that have an AUC."""
    auc: float | None
    """Mean over the images."""
    patch_auc: float | None
    """Of the image's patches of the same size: mean over the images."""
    gain: float | None
    """auc less patch_auc."""
    gain_error: float | None
    """Standard error of the gain over the images; None for fewer than two."""


@dataclass
class _Tally:
    """One stage over all images."""

    stage: Stage
    border: int = 0
    counted: int = 0
    """Positions."""
    areas: list[tuple[float, float]] = field(default_factory=list)
    """AUC of the features and of the patches, by image."""

    def add(self, result: Measured) -> None:
        self.border += int(result.border[result.counted].sum())
        self.counted += int(result.counted.sum())
        if result.area is not None and result.patch_area is not None:
            self.areas.append((result.area, result.patch_area))

    def score(self) -> StageScore:
        count, gains = len(self.areas), [area - patch_area for area, patch_area in self.areas]
        auc, patch_auc = (mean(values) for values in zip(*self.areas, strict=True)) if count else (None, None)
        return StageScore(
            **asdict(self.stage),
            border_share=self.border / max(1, self.counted),
            images=count,
            auc=auc,
            patch_auc=patch_auc,
            gain=mean(gains) if gains else None,
            gain_error=stdev(gains) / math.sqrt(count) if count > 1 else None,
        )


@dataclass(frozen=True)
class Example:
    """One image for the picture."""

    key: str
    image: np.ndarray
    """(H, W, 3) uint8."""
    ids: np.ndarray
    """(H', W') uint8 train ids whose borders count."""
    measured: Sequence[Measured]


@dataclass(frozen=True)
class Diagnosis:
    """The figures of one encoder on one split."""

    subject: str
    domain: Domain
    split: str
    borders: str
    """`labels` or `prediction`."""
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
        where = "the encoder's output" if best.name == OUTPUT else best.name
        figures = (
            f"{where}: its local variation finds class borders "
            f"with AUC {best.auc:.3f}, that of {best.stride} x {best.stride} image patches with {best.patch_auc:.3f} "
            f"(difference {best.gain:+.3f}{error}).{left_out}"
        )
        if best.gain > 2 * (best.gain_error or 0.0):
            return f"The cluster assumption holds best at {figures}"
        return f"At no stage do class borders stand out clearly more than in the image itself; nearest is {figures}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        best = self.best.name if self.best else None
        return vars(self) | {
            "domain": self.domain.name,
            "stages": [asdict(score) for score in self.stages],
            "best": best,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class DiagnosisSettings:
    """Which images are measured, and against which borders."""

    split: str = "val"
    borders: str | None = None
    """`labels` or `prediction`; None takes the labels when the split has masks, else the prediction. With labels,
    images without a mask are left out.
    """
    limit: int | None = None
    """How many images are measured, the first of the shards; None: all."""
    examples: int = 0
    """How many of them are kept for a picture."""


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
    tallies = [_Tally(stage) for stage in subject.stages]
    for number in progress(numbers, len(numbers)):
        record = shards.read(number, with_mask=borders == "labels")
        picture, mask = decode(record, domain)
        image = image_tensor(picture).to(subject.device)
        ids = _predicted(subject, image) if mask is None else mask_tensor(mask).to(subject.device)
        results = measure(subject, image, ids=ids, num_classes=domain.num_classes)
        for result, tally in zip(results, tallies, strict=True):
            if not bool(result.features.isfinite().all()):
                found = f"the features of {result.stage.name} are not finite"
                raise UserError(f"{record.where}: {found}. Use another checkpoint or weights.")
            tally.add(result)
        if len(examples) < settings.examples:
            examples.append(Example(record.key, np.asarray(picture), ids.cpu().numpy(), results))
    scores = tuple(tally.score() for tally in tallies)
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
