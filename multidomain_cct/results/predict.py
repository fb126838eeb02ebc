"""Segment images with a trained run: index PNG, colour PNG and overlay of each, names and sizes kept."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from multidomain_cct.errors import UserError
from multidomain_cct.evaluation.inference import InferenceSettings
from multidomain_cct.files.durable import replacing
from multidomain_cct.results.pictures import indexed, legend, with_legend
from multidomain_cct.results.trained_run import Prediction, TrainedRun

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""What counts as an image in a folder; a file that is named itself may have any ending."""
KINDS = ("index", "color", "overlay")
"""Folders of an output folder."""


@dataclass
class PredictSummary:
    """What became of the images."""

    written: int = 0
    unreadable: list[str] = field(default_factory=list)
    """One line, path and reason, for each image that was skipped."""


def predict(
    run: TrainedRun,
    domain: str,
    sources: Sequence[Path],
    out: Path,
    settings: InferenceSettings | None = None,
    *,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> PredictSummary:
    """Predict the classes of `domain` for images and folders of images.

    `a/b.jpg` in the folder source `a` becomes `b.png` in `out/index` (palette PNG; indices are train ids), `out/color`
    and `out/overlay`; index and color have the size of the image turned upright. Images that would meet under one name
    keep their ending in it: `b.jpg.png`. `progress(images, total)` wraps the iteration.

    Raises UserError, before anything is written, for a domain without a head, a source without images, names that meet
    nevertheless, and an output in place of an input.
    """
    classes = run.domains[run.require_head(domain)]
    images = _output_names(sources, out)
    _require_safe_outputs(images, out)
    for kind in KINDS:
        (out / kind).mkdir(parents=True, exist_ok=True)
    summary = PredictSummary()
    pairs = list(images.items())
    for name, path in pairs if progress is None else progress(pairs, len(pairs)):
        try:
            prediction = run.predict(path, domain, settings=settings)
        except UserError as error:
            summary.unreadable.append(str(error))
            continue
        ids = prediction.ids
        for kind, picture in zip(
            KINDS, (indexed(ids, classes), prediction.colored(), _with_key(prediction)), strict=True
        ):
            _write_png(picture, out / kind / name)
        summary.written += 1
    return summary


def _with_key(prediction: Prediction) -> Image.Image:
    """The overlay above a legend of the classes that it shows."""
    image = prediction.image
    text_size = min(40, max(12, min(image.size) // 24))
    present = np.unique(prediction.ids).tolist()
    key = legend(prediction.label_space, present, width=image.width, text_size=text_size)
    return with_legend(prediction.overlay(), key)


def _output_names(sources: Sequence[Path], out: Path) -> dict[PurePath, Path]:
    """Every image by its name below `out/<kind>`. An image that is reached twice counts once."""
    for source in sources:
        if not (source.is_dir() or source.is_file()):
            raise UserError(f"{source}: there is no such image or folder.")
    found: dict[Path, tuple[Path, PurePath]] = {}
    for source in sources:
        images = list(_images_in(source, out)) if source.is_dir() else [(source, PurePath(source.name))]
        if not images:
            raise UserError(
                f"{source} holds no images. Images end in {', '.join(ENDINGS)}; hidden files and folders are left out."
            )
        for path, relative in images:
            found.setdefault(_place(path), (path, relative))
    meeting = Counter(relative.with_suffix(".png") for _, relative in found.values())
    names: dict[PurePath, Path] = {}
    for path, relative in found.values():
        short = relative.with_suffix(".png")
        name = short if meeting[short] == 1 else relative.with_name(relative.name + ".png")
        if name in names:
            raise UserError(
                f"{names[name]} and {path} would both be written as {name}. Predict them one after the other, each "
                "with its own --out."
            )
        names[name] = path
    return names


def _images_in(folder: Path, out: Path) -> Iterator[tuple[Path, PurePath]]:
    """The images below a folder, with their path relative to it, in order.

    What an earlier prediction wrote to `out` is left out.
    """
    written = {(out / kind).resolve() for kind in KINDS}
    earlier = written if all(path.is_dir() for path in written) else set()
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (Path(parent) / name).resolve() not in earlier
        )
        for name in sorted(files):
            path = Path(parent) / name
            if not name.startswith(".") and path.suffix.lower() in ENDINGS and path.is_file():
                yield path, path.relative_to(folder)


def _require_safe_outputs(images: dict[PurePath, Path], out: Path) -> None:
    inputs = {path.resolve() for path in images.values()} | {_place(path) for path in images.values()}
    for kind in KINDS:
        for place in (out, out / kind):
            if place.exists() and not place.is_dir():
                raise UserError(f"{place} is a file; --out names a folder, which receives {', '.join(KINDS)}.")
        for name in images:
            if _place(out / kind / name) in inputs:
                raise UserError(f"{out / kind / name} is an input and would be written over. Choose another --out.")


def _place(path: Path) -> Path:
    """Where the file itself lies, however its folder was reached; a link stays a link."""
    return path.parent.resolve() / path.name


def _write_png(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=False) as temporary:
        picture.save(temporary, "PNG")
