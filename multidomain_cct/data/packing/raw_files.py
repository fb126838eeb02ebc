"""Raw files: which are images, their sample keys, and which mask belongs to which image.

Images and masks are paired by name, never by listing order: one missing file would silently shift all later pairs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

from multidomain_cct.data.domain import Domain, Split
from multidomain_cct.data.shards.keys import escape_key
from multidomain_cct.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MASK_ENDINGS = ("_mask", "-mask", "_label", "_gt")
"""Endings that a mask's name may add to its image's name in the layout `folder`."""
LONGEST_KEY = 200
"""File systems allow names of 255 bytes, which include a suffix."""


class MissingRawFiles(UserError):
    """Files of a split are not in the raw folder; the data set may be incomplete."""


@dataclass(frozen=True)
class MaskFile:
    """Where the labels of one image are, and which values they have."""

    path: Path
    cell: int | None = None
    """Position in the label table of SUNRGBD2Dseg.mat; None for an image file."""
    train_ids: bool = False
    """True when the file holds train ids, not raw ids."""


@dataclass(frozen=True)
class RawSample:
    """One image of a raw data set."""

    key: str
    """Name of the sample in shards and logs: flat, and unique in its split."""
    image: Path
    mask: MaskFile | None
    """None in an unlabelled split."""


def matched_samples(domain: Domain, raw: Path, split: str, globs: Split) -> list[RawSample]:
    """The images and masks that two globs match. Pairs have the same path below the fixed leading folder of their glob,
    without the glob's ending.
    """
    images = _globbed(raw, globs.images, f"{domain.name}: splits.{split}.images")
    if not images:
        raise MissingRawFiles(f"{raw}: split {split} of {domain.name} needs {globs.images}, and no image matches that.")
    if not globs.masks:
        return unlabelled_samples(images)
    masks = _globbed(raw, globs.masks, f"{domain.name}: splits.{split}.masks")
    for stem in sorted(images.keys() - masks.keys()):
        extended = [stem + ending for ending in MASK_ENDINGS if stem + ending in masks and stem + ending not in images]
        if len(extended) > 1:
            names = " and ".join(masks[name].name for name in extended)
            raise UserError(f"{images[stem]}: has {len(extended)} masks, {names}; keep one.")
        if extended:
            masks[stem] = masks.pop(extended[0])
    files = {stem: MaskFile(path) for stem, path in masks.items()}
    return paired_samples(images, files, lambda stem: f"the name {stem} in {globs.masks}")


def paired_samples(
    images: Mapping[str, Path], masks: Mapping[str, MaskFile], expected: Callable[[str], str]
) -> list[RawSample]:
    """One sample for each name; images and masks must have the same names."""
    if lonely := [stem for stem in images if stem not in masks]:
        more = f" ({len(lonely)} of {len(images)} images have none)" if len(lonely) > 1 else ""
        raise UserError(
            f"{images[lonely[0]]}: has no mask; expected {expected(lonely[0])}{more}. Add the masks, or take the "
            "images out of the split."
        )
    if lonely := [stem for stem in masks if stem not in images]:
        more = f" ({len(lonely)} of {len(masks)} masks have none)" if len(lonely) > 1 else ""
        raise UserError(
            f"{masks[lonely[0]].path}: has no image; expected the name {lonely[0]}{more}. Add the images, or take the "
            "masks out of the split."
        )
    return [RawSample(sample_key(stem), image, masks[stem]) for stem, image in images.items()]


def listed_samples(
    images: Mapping[str, Path], masks: Mapping[str, Path], stems: list[str], where: str, expected: Callable[[str], str]
) -> list[RawSample]:
    """The samples of a list; other files belong to other splits."""
    for stem, count in Counter(stems).items():
        if stem not in images:
            folder = next(iter(images.values())).parent
            raise UserError(f"{where} {stem}, and {folder} has no such image. Add the image, or take the name out.")
        if count > 1:
            raise UserError(f"{where} {stem} {count} times; keep one.")
    chosen = {stem: images[stem] for stem in stems}
    return paired_samples(chosen, {stem: MaskFile(masks[stem]) for stem in chosen if stem in masks}, expected)


def unlabelled_samples(images: Mapping[str, Path]) -> list[RawSample]:
    return [RawSample(sample_key(stem), image, None) for stem, image in images.items()]


def sample_key(stem: str) -> str:
    """The key of a path in the shards."""
    key = escape_key(stem)
    if len(key) > LONGEST_KEY:
        raise UserError(
            f"{stem}: gives a sample key of {len(key)} characters; at most {LONGEST_KEY} fit. Shorten its names."
        )
    return key


def image_files(folder: Path, pattern: str) -> list[Path]:
    """The image files below a folder that match a glob, sorted; no hidden ones, such as a Mac's ._ copies."""
    files = (path for path in folder.glob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def images_in(folder: Path, pattern: str, domain: Domain, split: str) -> dict[str, Path]:
    """The images of a folder by stem; at least one."""
    images = by_stem(image_files(folder, pattern), pattern.rpartition("*")[2])
    if not images:
        state = "no image there matches that" if folder.is_dir() else "there is no such folder"
        raise MissingRawFiles(f"{folder}: split {split} of {domain.name} needs {pattern} in it, and {state}.")
    return images


def by_stem(paths: Iterable[Path], ending: str = "") -> dict[str, Path]:
    """Files by their name without the given ending, or without the suffix."""
    return unique_names((path.name.removesuffix(ending) if ending else path.stem, path) for path in paths)


def _globbed(raw: Path, pattern: str, where: str) -> dict[str, Path]:
    """The image files that a glob matches, by path below its fixed leading folder, without its fixed ending or, if it
    has none, without the suffix.
    """
    *folders, name = PurePosixPath(pattern).parts or ("",)
    if not name or PurePosixPath(pattern).is_absolute() or ".." in folders or re.search(r"[^/]\*\*|\*\*[^/]", pattern):
        raise UserError(
            f"{where} is {pattern}; a glob is relative to the raw folder and stays in it, and ** is a whole folder. "
            "Write it as in images/**/*.jpg."
        )
    home = raw.joinpath(*takewhile(lambda part: not re.search(r"[*?[]", part), folders))
    # *_rgb.png has an ending that its masks need not share; *.[jp]* has none.
    ending = re.split(r"[*?\]]", name)[-1].removeprefix(name)
    below = ((path.relative_to(home).as_posix(), path) for path in image_files(raw, pattern))
    return unique_names(
        (text.removesuffix(ending) if "." in ending else str(PurePosixPath(text).with_suffix("")), path)
        for text, path in below
    )


def unique_names(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    by_name: dict[str, Path] = {}
    for name, path in named:
        if name in by_name:
            raise UserError(f"{path}: goes by the name {name}, as {by_name[name]} does. Keep one, or rename one.")
        by_name[name] = path
    return by_name


def listed_stems(path: Path) -> list[str]:
    """The stems in a list file: one sample a line, as a stem or as paths, of which the first counts."""
    if not path.is_file():
        raise MissingRawFiles(f"{path}: there is no such file. It names the images of a split, one a line.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: this is not text in UTF-8. It names the images of a split, one a line.") from None
    return [PurePosixPath(line.split()[0]).stem for line in lines if line.strip()]
