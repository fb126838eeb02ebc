"""A trained run: images in, class ids out. What the Python interface, `predict`, `evaluate` and `report` share.

Shapes: C classes of the domain, H W size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.images import decoded, load_image
from multidomain_cct.errors import UserError, did_you_mean
from multidomain_cct.evaluation.inference import InferenceSettings
from multidomain_cct.evaluation.photos import photo_probabilities, trained_size
from multidomain_cct.results.pictures import OPACITY, colored, overlay
from multidomain_cct.results.records import recorded_image_size
from multidomain_cct.training.checkpoints.checkpoint import LoadedRun, load_run

ImageInput = str | PathLike[str] | Image.Image | np.ndarray | Tensor
"""A path, a PIL image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor."""


def available_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, eq=False)
class Prediction:
    """The classes of one image, as a run predicts them."""

    ids: np.ndarray = field(repr=False)
    """(H, W) uint8 train ids, positions in `classes`, at the image's own size."""
    probabilities: np.ndarray | None = field(repr=False)
    """(C, H, W) float32 class probabilities, 0 to 1, when they were asked for."""
    image: Image.Image = field(repr=False)
    """The image itself, RGB, turned upright as its EXIF tag asks."""
    label_space: Domain = field(repr=False)
    seen_at: tuple[int, int]
    """(width, height) at which the network saw the image."""

    @property
    def domain(self) -> str:
        return self.label_space.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by train id."""
        return tuple(label.name for label in self.label_space.classes)

    def colored(self) -> Image.Image:
        """The ids in the classes' colours."""
        return colored(self.ids, self.label_space)

    def overlay(self, opacity: float = OPACITY) -> Image.Image:
        """The image with the classes' colours laid over it; opacity is 0 to 1."""
        return overlay(self.image, self.ids, self.label_space, opacity)


@dataclass(frozen=True)
class TrainedRun(LoadedRun):
    """A run with its weights, ready to predict and to be scored."""

    device: torch.device
    weights: str
    """Which predict: `ema`, the running average; `student`, those that were trained, beside an average; `trained`, of a
    run without one.
    """

    @classmethod
    def load(
        cls, folder: Path, checkpoint: str = "last", device: torch.device | None = None, weights: str | None = None
    ) -> TrainedRun:
        """The run in a folder, with the checkpoint `last`, `best` or a folder, on the GPU when there is one.

        `weights` None: the running average, if the run keeps one. Raises UserError when the folder is not a run, its
        checkpoint is absent or damaged, or it does not have these weights.
        """
        loaded, device = load_run(folder, checkpoint), device or available_device()
        kept = ("trained",) if loaded.model.teacher is None else ("ema", "student")
        weights = weights or kept[0]
        if weights not in kept:
            remedy = "It keeps no running average" if kept == ("trained",) else "It keeps a running average"
            raise UserError(f"{folder} has no {weights} weights. {remedy}: choose {' or '.join(kept)}.")
        loaded.model.predicts_as_student = weights == "student"
        loaded.model.to(device)
        return cls(**vars(loaded), device=device, weights=weights)

    @property
    def described(self) -> str:
        """Checkpoint, folder and weights, for people."""
        return f"{self.checkpoint.name} of {self.folder}" + ("" if self.weights == "trained" else f", {self.weights}")

    def head(self, domain: str | None = None) -> Domain:
        """The domain of that name; None: the only one. Raises UserError, which lists the run's domains, otherwise."""
        if domain is None and len(self.domains) > 1:
            raise UserError(f"{self.folder} has {len(self.domains)} domains; name one: {', '.join(self.domains)}.")
        name = next(iter(self.domains)) if domain is None else domain
        if name not in self.domains:
            raise UserError(
                f'{self.folder} has no head for the domain "{name}". It has: '
                f"{', '.join(self.domains)}.{did_you_mean(name, self.domains)}"
            )
        return self.domains[name]

    def settings(
        self, *, window: Sequence[int] | None = None, scales: Sequence[float] | None = None, flip: bool = False
    ) -> InferenceSettings:
        """The recipe's inference settings, with these replaced."""
        asked = {"window": window and list(window), "scales": scales and list(scales), "flip": flip}
        return replace(self.recipe.evaluation, **{key: value for key, value in asked.items() if value})  # type: ignore[arg-type]

    def seen_at(self, size: tuple[int, int], domain: Domain) -> tuple[int, int]:
        """(width, height) at which the network sees a photograph of this size: that of the training images."""
        return trained_size(size, domain.size, recorded_image_size(self.folder, domain.name))

    # A path is a sequence of paths to the type checker, and the first signature is the one that it takes.
    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        image: ImageInput,
        domain: str | None = None,
        *,
        probabilities: bool = False,
        settings: InferenceSettings | None = None,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        image: Sequence[ImageInput],
        domain: str | None = None,
        *,
        probabilities: bool = False,
        settings: InferenceSettings | None = None,
    ) -> list[Prediction]: ...

    def predict(
        self,
        image: ImageInput | Sequence[ImageInput],
        domain: str | None = None,
        *,
        probabilities: bool = False,
        settings: InferenceSettings | None = None,
    ) -> Prediction | list[Prediction]:
        """The classes of `domain` in an image, or in each of a list of images.

        The network sees an image at the size of the training images, and the answer has the image's own size. A run of
        one domain needs no `domain`. `settings` None predicts as in training. Raises UserError for a domain
        that the run does not have, for an array or tensor of another type or shape, and for a file that is not an
        image.
        """
        head = self.head(domain)
        if isinstance(image, (list, tuple)):
            return [self._predict(each, head, probabilities, settings) for each in image]
        return self._predict(image, head, probabilities, settings)  # type: ignore[arg-type]

    def _predict(
        self, image: ImageInput, domain: Domain, probabilities: bool, settings: InferenceSettings | None
    ) -> Prediction:
        photo = as_rgb(image)
        seen_at = self.seen_at(photo.size, domain)
        ids = np.empty((photo.height, photo.width), dtype=np.uint8)
        scores = np.empty((domain.num_classes, *ids.shape), dtype=np.float32) if probabilities else None
        parts = photo_probabilities(self.model, photo, domain.name, seen_at, settings or self.recipe.evaluation)
        for where, part in parts:
            ids[where] = part.argmax(dim=0).to(torch.uint8).cpu().numpy()
            if scores is not None:
                scores[:, *where] = part.cpu().numpy()
        return Prediction(ids, scores, photo, domain, seen_at)


def as_rgb(image: ImageInput) -> Image.Image:
    """The image as 8-bit RGB, turned upright. Raises UserError for what is not an image, or is one of another type."""
    if isinstance(image, (str, PathLike)):
        return load_image(Path(image), str(image), large=True)
    if isinstance(image, Image.Image):
        # A copy: turning it upright would change the caller's.
        return decoded(image.copy(), "the image")
    pixels = image
    if isinstance(pixels, Tensor) and pixels.ndim == 3 and pixels.shape[0] == 3:
        pixels = pixels.permute(1, 2, 0).cpu().numpy()
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[2:] == (3,) and pixels.size:
        return Image.fromarray(np.ascontiguousarray(pixels))
    shown = f"{tuple(image.shape)} {image.dtype}" if isinstance(image, (np.ndarray, Tensor)) else ""
    raise UserError(
        f"the image is a {type(image).__name__} {shown}".rstrip() + "; allowed are a path, a PIL image, an (H, W, 3) "
        "uint8 array, a (3, H, W) uint8 tensor, and a list of these."
    )
