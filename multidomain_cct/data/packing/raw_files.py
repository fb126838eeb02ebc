"""Raw files: which are images, and which mask belongs to which image.

Images and masks are paired by name, never by listing order: one missing file would silently shift all later pairs.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

from multidomain_cct.data.domain import Domain, Split
from multidomain_cct.data.shards.keys import escape_key
from multidomain_cct.errors import UserError

IMAGE_SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
MASK_ENDINGS = ("_mask", "-mask", "_label", "_gt")
"""Endings that a mask's name may add to its image's name in the layout `folder`."""
LONGEST_KEY = 200
"""File systems allow names of 255 bytes, which include a suffix."""
_WILDCARD = re.compile(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^]]*\])")


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
    """One image of a raw data set; in an unlabelled split without a mask."""

    key: str
    """Name of the sample in shards: flat, and unique in its split."""
    image: Path
    mask: MaskFile | None


def matched_samples(domain: Domain, raw: Path, split: str, globs: Split) -> list[RawSample]:
    """The images and masks that two globs match. A pair has the same path below the fixed leading folders of the globs,
    without their endings; if no two files have, the wildcards of both globs stand for the same text.
    """
    images = _globbed(raw, globs.images, f"{domain.name}: splits.{split}.images")
    if not images:
        others = _read_as_images(raw, globs.images)
        raise MissingRawFiles(
            f"{raw}: split {split} of {domain.name} needs {globs.images}, and no image matches that{others}."
        )
    if not globs.masks:
        return unlabelled_samples(images)
    masks = _globbed(raw, globs.masks, f"{domain.name}: splits.{split}.masks")
    if not any(stem + ending in masks for stem in images for ending in ("", *MASK_ENDINGS)):
        stems = {_wildcard_text(raw, globs.images, path): stem for stem, path in images.items()}
        masks = unique_names(
            (stems.get(_wildcard_text(raw, globs.masks, path), name), path) for name, path in masks.items()
        )
    for stem in sorted(images.keys() - masks.keys()):
        extended = [stem + ending for ending in MASK_ENDINGS if stem + ending in masks and stem + ending not in images]
        if len(extended) > 1:
            names = " and ".join(masks[name].name for name in extended)
            raise UserError(f"{images[stem]}: has {len(extended)} masks, {names}; keep one.")
        if extended:
            masks[stem] = masks.pop(extended[0])
    files = {stem: MaskFile(path) for stem, path in masks.items()}
    return paired_samples(
        images, files, lambda stem: f"the name {stem} in {globs.masks}{_read_as_images(raw, globs.masks)}"
    )


def _read_as_images(raw: Path, pattern: str) -> str:
    others = other_files(raw, pattern)
    return f" ({others} match, but only {' '.join(sorted(IMAGE_SUFFIXES))} are read)" if others else ""


def paired_samples(
    images: Mapping[str, Path], masks: Mapping[str, MaskFile], expected: Callable[[str], str]
) -> list[RawSample]:
    """One sample for each name; images and masks must have the same names."""
    _require_partners(images, masks, "mask", expected)
    _require_partners(
        {stem: mask.path for stem, mask in masks.items()}, images, "image", lambda stem: f"the name {stem}"
    )
    return [RawSample(sample_key(stem), image, masks[stem]) for stem, image in images.items()]


def _require_partners(
    files: Mapping[str, Path], partners: Iterable[str], what: str, expected: Callable[[str], str]
) -> None:
    if lonely := [stem for stem in files if stem not in partners]:
        more = f" ({len(lonely)} of {len(files)} have none)" if len(lonely) > 1 else ""
        raise UserError(
            f"{files[lonely[0]]}: has no {what}; expected {expected(lonely[0])}{more}. Add what is missing, or take "
            "the file out of the split."
        )


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
    """The image files below a folder that a glob matches, sorted."""
    return [path for path in _matching_files(folder, pattern) if path.suffix.lower() in IMAGE_SUFFIXES]


def other_files(folder: Path, pattern: str) -> str:
    """Numbers and endings of the files that a glob matches and that are not read as images."""
    endings = Counter(path.suffix.lower() for path in _matching_files(folder, pattern))
    return ", ".join(
        f"{count} {ending or 'without ending'}"
        for ending, count in sorted(endings.items())
        if ending not in IMAGE_SUFFIXES
    )


def _matching_files(folder: Path, pattern: str) -> list[Path]:
    home, depth = folder / _fixed_folders(pattern), 99 if "**" in pattern else 1 + pattern.count("/")
    expression = _expression(pattern)
    found = _files_below(home, depth, frozenset()) if home.is_dir() else ()
    return sorted(path for path in found if expression.fullmatch(path.relative_to(folder).as_posix()))


def _files_below(folder: Path, depth: int, above: frozenset[str]) -> Iterator[Path]:
    """Files and links to files; no hidden ones, such as a Mac's ._ copies. Linked folders are followed, but not to a
    folder above themselves.
    """
    if (real := os.path.realpath(folder)) in above:
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            # A link whose file is gone counts, so that it is an error and not a smaller data set.
            yield from [Path(entry.path)] if entry.is_file() or entry.is_symlink() else []
        elif depth > 1:
            yield from _files_below(Path(entry.path), depth - 1, above | {real})


def _fixed_folders(pattern: str) -> str:
    """The folders of a glob before its first wildcard."""
    return "/".join(takewhile(lambda part: not _WILDCARD.search(part), PurePosixPath(pattern).parts[:-1]))


def _expression(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression with a group for each wildcard. The ending may be of either case."""
    translated = {"**/": "(?:(.+)/)?", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}
    parts = (
        translated.get(part) or (f"([{part[1:-1].replace('!', '^', 1)}])" if part[:1] == "[" else re.escape(part))
        for part in _WILDCARD.split(pattern)
    )
    stem, dot, suffix = "".join(parts).rpartition(r"\.")
    return re.compile(f"{stem}{dot}(?i:{suffix})" if "/" not in suffix else stem + dot + suffix, re.DOTALL)


def _wildcard_text(raw: Path, pattern: str, path: Path) -> str:
    """The text for which the wildcards of a glob stand in a path that it matches, without the path's suffix."""
    found, bare = path.relative_to(raw), PurePosixPath(pattern).with_suffix("").as_posix()
    match = _expression(bare).fullmatch(found.with_suffix("").as_posix()) or _expression(pattern).fullmatch(str(found))
    assert match is not None
    return "/".join(filter(None, match.groups()))


def files_by_stem(folder: Path, pattern: str) -> dict[str, Path]:
    """The image files that a glob matches by their name without what follows its last star, or without the suffix."""
    ending = len(pattern.rpartition("*")[2])
    paths = image_files(folder, pattern)
    return unique_names((path.name[:-ending] if ending else path.stem, path) for path in paths)


def images_in(folder: Path, pattern: str, domain: Domain, split: str) -> dict[str, Path]:
    """As `files_by_stem`, at least one."""
    images = files_by_stem(folder, pattern)
    if not images:
        state = "no image there matches that" if folder.is_dir() else "there is no such folder"
        raise MissingRawFiles(f"{folder}: split {split} of {domain.name} needs {pattern} in it, and {state}.")
    return images


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
    pattern = str(PurePosixPath(pattern))
    home = raw / _fixed_folders(pattern)
    # *_rgb.png has an ending that its masks need not share; *.[jp]* has none.
    ending = re.split(r"[*?\]]", name)[-1].removeprefix(name)
    below = ((path.relative_to(home), path) for path in image_files(raw, pattern))
    return unique_names(
        (str(place)[: -len(ending)] if "." in ending else str(place.with_suffix("")), path) for place, path in below
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
