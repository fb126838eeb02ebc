"""Segment images with a trained run: index PNG, colour PNG and overlay of each, names and sizes kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from multidomain_cct.errors import UserError
from multidomain_cct.evaluation.inference import InferenceSettings
from multidomain_cct.files.durable import replacing
from multidomain_cct.results.pictures import OPACITY, colored, indexed, legend, overlay, with_legend
from multidomain_cct.results.trained_run import Prediction, TrainedRun

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""What counts as an image in a folder; a file that is named itself may have any ending."""
KINDS = ("index", "color", "overlay")
"""Folders of an output folder."""

OVERLAY_SIDE = 4096
"""Longer side of the largest overlay, which is there to be looked at."""


@dataclass
class PredictSummary:
    """How many images were predicted, and which could not be."""

    written: int = 0
    unreadable: list[str] = field(default_factory=list)
    """One line, path and reason, for each image that was skipped."""
    resized: list[str] = field(default_factory=list)
    """Own size and size in the network, `4000x3000 at 320x240`, of images that were predicted at another one."""


def predict(
    run: TrainedRun,
    domain: str | None,
    sources: Sequence[Path],
    out: Path,
    settings: InferenceSettings | None = None,
    *,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> PredictSummary:
    """Predict the classes of `domain` (None: the run's only one) for images and folders of images.

    `a/b.jpg` in the folder source `a` becomes `b.png` in `out/index` (palette PNG; indices are train ids), `out/color`
    and `out/overlay`; index and color have the size of the image turned upright, and so has an overlay of up to 4096
    pixels. The network sees images at the size of the training images. Images that differ only in their ending keep
    it: `b.jpg.png`. `progress(images, total)` wraps the iteration.

    Raises UserError, before anything is written, for a domain without a head, a source without images, two images of
    one name, and an output that would replace an input.
    """
    run.head(domain)
    images = _output_names(sources, out)
    _require_safe_outputs(images, out)
    for kind in KINDS:
        (out / kind).mkdir(parents=True, exist_ok=True)
    summary = PredictSummary()
    for name, path in progress(images.items(), len(images)):
        try:
            result = run.predict(path, domain, settings=settings)
        except UserError as error:
            summary.unreadable.append(str(error))
            continue
        if result.seen_at != result.image.size:
            (width, height), (seen_width, seen_height) = result.image.size, result.seen_at
            summary.resized.append(f"{width}x{height} at {seen_width}x{seen_height}")
        _save(_overlay_with_legend(result), out / "overlay" / name)
        ids, label_space = result.ids, result.label_space
        # A large photograph and its colours would fill the memory together.
        del result
        _save(indexed(ids, label_space), out / "index" / name)
        _save(colored(ids, label_space), out / "color" / name)
        summary.written += 1
    return summary


def _save(picture: Image.Image, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, durable=False) as temporary:
        picture.save(temporary, "PNG")


def _overlay_with_legend(result: Prediction) -> Image.Image:
    """The overlay, shrunk to what can be looked at, above a legend of the classes that it shows."""
    image, ids = result.image, Image.fromarray(result.ids)
    if max(image.size) > OVERLAY_SIDE:
        image = ImageOps.contain(image, (OVERLAY_SIDE, OVERLAY_SIDE))
        ids = ids.resize(image.size, Image.Resampling.NEAREST)
    present, text_size = np.flatnonzero(ids.histogram()).tolist(), max(14, max(image.size) // 45)
    page = overlay(image, np.asarray(ids), result.label_space, OPACITY)
    return with_legend(page, legend(result.label_space, present, width=image.width, text_size=text_size))


def _output_names(sources: Sequence[Path], out: Path) -> dict[PurePath, Path]:
    """Every image by its name below `out/<kind>`. An image that is reached twice counts once."""
    below: dict[Path, PurePath] = {}
    for source in sources:
        if not (source.is_dir() or source.is_file()):
            raise UserError(f"{source}: there is no such image or folder.")
        images = _images_in(source, out) if source.is_dir() else [source]
        if not images:
            raise UserError(
                f"{source} holds no images. Images end in {', '.join(ENDINGS)}; hidden files and folders are left out."
            )
        for path in images:
            below.setdefault(_unlinked(path), path.relative_to(source if source.is_dir() else source.parent))
    counts = Counter(name.with_suffix("") for name in below.values())
    names: dict[PurePath, Path] = {}
    for path, name in below.items():
        name = name.with_suffix(".png") if counts[name.with_suffix("")] == 1 else name.with_name(f"{name.name}.png")
        if name in names:
            raise UserError(
                f"{names[name]} and {path} would both be written as {name}. Predict them one after the other, each "
                "with its own --out."
            )
        names[name] = path
    return names


def _images_in(folder: Path, out: Path) -> list[Path]:
    """The images below a folder, in order, without those that an earlier prediction wrote to `out`."""
    written = {(out / kind).resolve() for kind in KINDS}
    earlier = written if all(path.is_dir() for path in written) else set()

    def wanted(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return (
            path.suffix.lower() in ENDINGS and not hidden and path.is_file() and not earlier & {*path.resolve().parents}
        )

    return sorted(filter(wanted, folder.rglob("*")))


def _require_safe_outputs(images: dict[PurePath, Path], out: Path) -> None:
    for folder in (out, *(out / kind for kind in KINDS)):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; --out names a folder, which receives {', '.join(KINDS)}.")
    inputs = {path.resolve() for path in images.values()} | {_unlinked(path) for path in images.values()}
    for target in (out / kind / name for kind in KINDS for name in images):
        if _unlinked(target) in inputs:
            raise UserError(f"{target} is an input and would be replaced. Choose another --out.")


def _unlinked(path: Path) -> Path:
    """The path with links in its folder resolved; the file itself may be a link."""
    return path.parent.resolve() / path.name
