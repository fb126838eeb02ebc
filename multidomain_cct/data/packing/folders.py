"""The layout `folder`: what the `images` and `masks` of a domain's splits stand for."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.packing.annotations import annotations_of_many, is_labelme, read_json
from multidomain_cct.data.packing.raw_files import (
    CLASS,
    IMAGE_SUFFIXES,
    Glob,
    MaskFile,
    MissingRawFiles,
    RawSample,
    list_lines,
    matched_samples,
    sample_key,
    unique_names,
)
from multidomain_cct.data.packing.shapes import (
    Annotation,
    ClassMask,
    Shape,
    require_background,
    require_classes,
    shape_train_id,
)
from multidomain_cct.errors import UserError
from multidomain_cct.files.printable import first_few


def folder_samples(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """The samples of a split. Images and labels are found by two globs, by a list, or in annotations of many images."""
    files = domain.splits[split]
    if files.images.endswith(".txt"):
        samples = _listed(raw, raw / files.images)
    elif CLASS in files.masks:
        samples = _with_class_masks(domain, raw, split)
    elif files.masks and (paths := _annotations_of_many(domain, raw, split)):
        samples = _annotated(domain, raw, split, paths)
    else:
        samples = matched_samples(domain, raw, split, files)
    if any(sample.mask is not None and sample.mask.holds_shapes for sample in samples):
        require_background(domain)
    return samples


def _listed(raw: Path, path: Path) -> list[RawSample]:
    """The images of a list, each with its mask."""
    pairs = list_pairs(raw, path)
    home = os.path.commonpath([image.parent for image, _ in pairs])
    images = unique_names((str(image.relative_to(home).with_suffix("")), image) for image, _ in pairs)
    return [
        RawSample(sample_key(key), images[key], MaskFile(mask)) for key, (_, mask) in zip(images, pairs, strict=True)
    ]


def list_pairs(raw: Path, path: Path) -> list[tuple[Path, Path]]:
    """The images and masks in a list; its paths are relative to the raw folder.

    Raises UserError for a line that is not two paths of files, MissingRawFiles when there is no list or nothing in it.
    """
    pairs: list[tuple[int, Path, Path]] = []
    for number, line in enumerate(list_lines(path), start=1):
        if not line.strip():
            continue
        columns = re.split(r"\t+|\s*,\s*" if re.search(r"[\t,]", line.strip()) else r"\s+", line.strip())
        if len(columns) != 2:
            raise UserError(
                f"{path}: line {number} has {len(columns)} columns; a line is the path of an image, a space and the "
                "path of its mask. If paths have spaces, put a tab or a comma between the two."
            )
        # Some published lists write paths from the raw folder on with a slash in front.
        image, mask = (raw / column.lstrip("/") for column in columns)
        pairs.append((number, image, mask))
    absent = [(number, file) for number, *files in pairs for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"{path}: line {absent[0][0]} names {absent[0][1]}, and there is no such file ({len(absent)} of "
            f"{2 * len(pairs)} files are absent). Paths are relative to {raw}."
        )
    if not pairs:
        raise MissingRawFiles(f"{path}: names no image. A line is the path of an image, a space and that of its mask.")
    return [(image, mask) for _, image, mask in pairs]


def _images(domain: Domain, raw: Path, split: str) -> tuple[Glob, dict[str, Path]]:
    pattern = domain.splits[split].images
    photos = Glob(raw, pattern, f"{domain.name}: splits.{split}.images")
    if not (images := photos.images()):
        raise MissingRawFiles(
            f"{raw}: split {split} of {domain.name} needs {pattern}, and no image matches that{photos.unread()}."
        )
    return photos, images


def _with_class_masks(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """Images with a binary mask for each of their classes. A pair has the same name, or the same text for its stars."""
    photos, images = _images(domain, raw, split)
    pattern = domain.splits[split].masks
    labels = Glob(raw, pattern, f"{domain.name}: splits.{split}.masks")
    stems = {photos.wildcard_text(path): stem for stem, path in images.items()} | {stem: stem for stem in images}
    shapes: dict[str, list[Shape]] = {stem: [] for stem in images}
    for path in (path for path in labels.files if path.suffix.lower() in IMAGE_SUFFIXES):
        text, label = labels.wildcard_text(path), labels.class_name(path)
        shape_train_id(label, domain, str(path))
        if text not in stems:
            raise UserError(
                f"{path}: has no image; expected the name {text}. Add it, or take the mask out of the split."
            )
        shapes[stems[text]].append(Shape(label, "", ClassMask(path)))
    if lonely := [stem for stem, found in shapes.items() if not found]:
        raise UserError(
            f"{images[lonely[0]]}: has no mask of any class; expected the name {lonely[0]} in {pattern} ({len(lonely)} "
            f"of {len(images)} have none). Add what is missing, or take the file out of the split."
        )
    return [
        RawSample(sample_key(stem), images[stem], MaskFile(found[0].area.path, annotation=Annotation(tuple(found))))
        for stem, found in shapes.items()
        if isinstance(found[0].area, ClassMask)
    ]


def _annotations_of_many(domain: Domain, raw: Path, split: str) -> list[Path]:
    """The files with annotations of many images that `masks` names; none where it names a file for each image."""
    pattern = domain.splits[split].masks
    if not pattern.lower().endswith((".json", ".xml")):
        return []
    paths = Glob(raw, pattern, f"{domain.name}: splits.{split}.masks").files
    if not paths:
        raise MissingRawFiles(f"{raw}: split {split} of {domain.name} needs {pattern}, and no file matches that.")
    of_one = "*" in pattern and paths[0].suffix.lower() == ".json" and is_labelme(read_json(paths[0]))
    return [] if of_one else paths


def _annotated(domain: Domain, raw: Path, split: str, paths: list[Path]) -> list[RawSample]:
    """Images with their annotations in files of many images. Both must be complete but for those of other splits."""
    _, images = _images(domain, raw, split)
    named = _entries(paths)
    require_classes(named, domain, str(paths[0]))
    pairs = matched_names(images, named)
    others = [other for other in domain.splits if other != split]
    lonely = {stem: path for stem, path in images.items() if stem not in pairs}
    absent = set(named) - set(pairs.values())
    for other in others if lonely or absent else ():
        _leave_to(domain, raw, other, lonely, absent)
    if lonely:
        first = next(iter(lonely.values()))
        raise UserError(
            f"{paths[0]}: does not list {first} ({len(lonely)} of {len(images)} images of split {split} are not in "
            "it). Annotate them, or take them out of the split's `images`."
        )
    if absent:
        raise UserError(
            f"{paths[0]}: lists {min(absent)}, and no image of split {split} has this name ({len(absent)} of "
            f"{len(named)} are absent). Add the images below {raw}, or take them out of the file."
        )
    return [
        RawSample(sample_key(stem), path, MaskFile(paths[0], annotation=named[pairs[stem]]))
        for stem, path in images.items()
        if stem in pairs
    ]


def _entries(paths: list[Path]) -> dict[str, Annotation]:
    named: dict[str, Annotation] = {}
    for path in paths:
        found = annotations_of_many(path)
        if twice := sorted(named.keys() & found.keys()):
            raise UserError(f"{path}: lists {first_few(twice)}, as another file of the split does. Keep one.")
        named |= found
    return named


def _leave_to(domain: Domain, raw: Path, other: str, lonely: dict[str, Path], absent: set[str]) -> None:
    """Remove the images that another split's annotations list, and the names that another split's images have."""
    files = domain.splits[other]
    if absent and files.images and not files.images.endswith(".txt"):
        absent -= set(matched_names(Glob(raw, files.images, other).images(), absent).values())
    if lonely and files.masks and CLASS not in files.masks:
        try:
            paths = _annotations_of_many(domain, raw, other)
        except MissingRawFiles:
            return
        for stem in matched_names(lonely, _entries(paths)):
            del lonely[stem]


def matched_names(images: Mapping[str, Path], names: Iterable[str]) -> dict[str, str]:
    """By image, the name that annotations have for it: the same file name, with as many equal folders as possible.

    Raises UserError when two names fit an image equally, or two images a name.
    """
    by_file = defaultdict(list)
    for name in names:
        by_file[PurePosixPath(name.replace("\\", "/")).name].append(name)
    pairs: dict[str, str] = {}
    owners: dict[str, tuple[int, str]] = {}
    for stem, path in images.items():
        scored = sorted((_equal_folders(path, name), name) for name in by_file.get(path.name, ()))
        if not scored:
            continue
        (equal, name), runner_up = scored[-1], scored[-2][0] if len(scored) > 1 else -1
        if equal == runner_up or owners.get(name, (-1, ""))[0] == equal:
            two = f"{scored[-2][1]} and {name}" if equal == runner_up else f"{name}, as {images[owners[name][1]]} may"
            raise UserError(f"{path}: may be the annotations' {two}. Give the files names that differ.")
        if owners.get(name, (-1, ""))[0] < equal:
            pairs.pop(owners[name][1], None) if name in owners else None
            pairs[stem], owners[name] = name, (equal, stem)
    return pairs


def _equal_folders(path: Path, name: str) -> int:
    """How many of the last folders of two paths are equal."""
    pairs = list(zip(path.parts[-2::-1], PurePosixPath(name.replace("\\", "/")).parts[-2::-1], strict=False))
    return next((count for count, (mine, other) in enumerate(pairs) if mine != other), len(pairs))
