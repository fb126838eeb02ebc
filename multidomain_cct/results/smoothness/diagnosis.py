"""Where the cluster assumption holds: whether features vary where classes meet (the diagnosis behind CCT, section 3.1
of the paper).

Each stage of an encoder stands beside the image cut into patches as large as the stage's stride; how well the local
variation of either finds the class borders is an area under the ROC curve (AUC): the probability that a position at a
border varies more than one inside a class; 0.5 is chance.

Shapes: D channels, H W image size, H' W' size of the labels, h w grid of whole patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multidomain_cct.data.batches.views import PAD, decode, image_tensor, mask_tensor
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError
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
"""Name of the last stage of a run: what its context module makes of the backbone's."""
MOSTLY_BORDER = 0.9
"""Share of border positions from which on a grid has too few others to compare with, so that its stage takes no part in
the verdict.
"""


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
    run.require_head(domain)
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
    """One stage on one image, beside the image's patches of the same size."""

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
    size = (image.shape[-2], image.shape[-1])
    unit = math.lcm(*(stage.stride for stage in subject.stages))
    padded = (
        torch.tensor(PAD, dtype=torch.uint8, device=image.device)
        .view(3, 1, 1)
        .repeat(1, *(-(-side // unit) * unit for side in size))
    )
    padded[:, : size[0], : size[1]] = image
    on_grid: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    result = []
    for stage, features in zip(subject.stages, subject.features(padded[None]), strict=True):
        stride = stage.stride
        if stride not in on_grid:
            on_grid[stride] = (
                local_variation(image_patches(image, stride)),
                *class_borders(ids, size, stride=stride, num_classes=num_classes),
            )
        own = local_variation(features[0, :, : size[0] // stride, : size[1] // stride])
        result.append(Measured(stage, own, *on_grid[stride]))
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
        """The stage that gains most over patches of its size, among those whose grid is not MOSTLY_BORDER; None when no
        such stage has an AUC.
        """
        usable = [score for score in self.stages if score.gain is not None and score.border_share <= MOSTLY_BORDER]
        return max(usable, key=lambda score: score.gain or 0.0, default=None)

    @property
    def verdict(self) -> str:
        """On which stage the cluster assumption holds best, in one or two sentences."""
        best, crowded = self.best, [score for score in self.stages if score.border_share > MOSTLY_BORDER]
        left_out = "".join(
            f" Left out: {score.name}, where {100 * score.border_share:.0f} % of the positions are borders."
            for score in crowded
        )
        if best is None or best.gain is None:
            return (
                "No stage can be judged: on no grid are there enough positions both at borders and inside "
                f"classes.{left_out}"
            )
        place = "the encoder's output" if best.name == OUTPUT else best.name
        error = "" if best.gain_error is None else f", standard error {best.gain_error:.3f}"
        figures = (
            f"its local variation finds class borders with AUC {best.auc:.3f}, that of {best.stride} x {best.stride} "
            f"image patches with {best.patch_auc:.3f}"
            f" (difference {best.gain:+.3f}{error}).{left_out}"
        )
        if best.gain > 2 * (best.gain_error or 0.0):
            return f"The cluster assumption holds best at {place}: {figures}"
        return (
            f"At no stage do class borders stand out clearly more than in the image itself; nearest is {place}: "
            f"{figures}"
        )

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        plain = {
            "subject": self.subject,
            "domain": self.domain.name,
            "split": self.split,
            "borders": self.borders,
            "images": self.images,
        }
        return plain | {
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
        if self.borders not in (None, *BORDERS):
            raise UserError(f"--borders is {self.borders!r}; it is one of {', '.join(BORDERS)}.")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}; it is at least 1. Leave it out for the whole split.")


def diagnose(
    subject: Subject,
    domain: Domain,
    *,
    shards: Shards,
    settings: DiagnosisSettings,
    progress: Callable[[Iterable[int], int], Iterable[int]] = lambda items, total: items,
) -> tuple[Diagnosis, list[Example]]:
    """The figures over the images of a split, one image at a time, and the first of them as examples.
    `progress(numbers, total)` wraps the iteration.

    Raises UserError when there is nothing to take the borders from, and for features that are not finite.
    """
    borders = _choose_borders(
        settings, subject, f"{domain.name}/{settings.split}", labelled=bool(shards.labelled.any())
    )
    numbers = [number for number in range(len(shards)) if borders == "prediction" or shards.labelled[number]][
        : settings.limit
    ]
    examples: list[Example] = []
    own, peers = ([Tally(subject.device) for _ in subject.stages] for _ in range(2))
    for number in progress(numbers, len(numbers)):
        record = shards.read(number, with_mask=borders == "labels")
        picture, mask = decode(record, domain)
        image = image_tensor(picture).to(subject.device)
        ids = _predicted(subject, image) if mask is None else mask_tensor(mask).to(subject.device)
        measured = measure(subject, image, ids=ids, num_classes=domain.num_classes)
        _require_finite(measured, f"{record.shard}: key {record.key!r}")
        for result, features, patches in zip(measured, own, peers, strict=True):
            border = result.border[result.counted]
            features.add(result.features[result.counted], border, result.area)
            patches.add(result.patches[result.counted], border, result.patch_area)
        if len(examples) < settings.examples:
            examples.append(
                Example(record.key, np.asarray(picture), ids.cpu().numpy(), tuple(result.cpu() for result in measured))
            )
    scores = tuple(
        _score(stage, features, patches) for stage, features, patches in zip(subject.stages, own, peers, strict=True)
    )
    return Diagnosis(subject.name, domain, settings.split, borders, len(numbers), scores), examples


def _choose_borders(settings: DiagnosisSettings, subject: Subject, where: str, *, labelled: bool) -> str:
    chosen = settings.borders or ("labels" if labelled else "prediction")
    if chosen == "labels" and not labelled:
        raise UserError(
            f"{where} has no masks, so there are no labelled borders. Name a labelled split, or a run with --borders "
            "prediction."
        )
    if chosen == "prediction" and subject.predict is None:
        reason = "--borders is prediction" if settings.borders else f"{where} has no masks"
        raise UserError(
            f"{reason}, but {subject.name} is an encoder without a head and predicts no borders. Name a run, or a "
            "labelled split."
        )
    return chosen


@torch.inference_mode()
def _predicted(subject: Subject, image: Tensor) -> Tensor:
    assert subject.predict is not None
    return subject.predict(image[None])


def _require_finite(measured: Sequence[Measured], where: str) -> None:
    for result in measured:
        if not bool(result.features.isfinite().all()):
            raise UserError(
                f"{where}: the features of {result.stage.name} are not finite, so their variation says nothing. Use "
                "another checkpoint or weights."
            )


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
