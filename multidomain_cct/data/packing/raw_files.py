"""Raw files: which are images, and which mask belongs to which image.

Images and masks are paired by name, never by listing order: one missing file would silently shift all later pairs.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePosixPath

from multidomain_cct.data.domain import Domain, Split
from multidomain_cct.data.packing.shapes import Annotation, ClassMask
from multidomain_cct.data.shards.keys import escape_key
from multidomain_cct.errors import UserError

IMAGE_SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
MASK_ENDINGS = ("_mask", "-mask", "_label", "_gt")
"""Endings that a mask's name may add to its image's name in the layout `folder`."""
ANNOTATION_SUFFIXES = (".json", ".txt")
"""Of files with the shapes of one image: Labelme's and YOLO's."""
CLASS = "{class}"
"""In a glob: the text that names a mask's class."""
LONGEST_KEY = 200
"""File systems allow names of 255 bytes, which include a suffix."""
_WILDCARD = re.compile(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^]]*\]|\{class\})")


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
    annotation: Annotation | None = None
    """The shapes of the image, where the file has those of many images."""

    @property
    def files(self) -> list[Path]:
        """All files that hold labels of the image."""
        shapes = self.annotation.shapes if self.annotation else ()
        return [shape.area.path for shape in shapes if isinstance(shape.area, ClassMask)] or [self.path]

    @property
    def holds_shapes(self) -> bool:
        """Whether labels are areas, outside which is the domain's background."""
        return self.annotation is not None or self.path.suffix.lower() in ANNOTATION_SUFFIXES


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
    photos = Glob(raw, globs.images, f"{domain.name}: splits.{split}.images")
    images = photos.images()
    if not images:
        raise MissingRawFiles(
            f"{raw}: split {split} of {domain.name} needs {globs.images}, and no image matches that{photos.unread()}."
        )
    if not globs.masks:
        return unlabelled_samples(images)
    labels = Glob(raw, globs.masks, f"{domain.name}: splits.{split}.masks")
    suffix = PurePosixPath(globs.masks).suffix.lower()
    masks, hint = labels.images([suffix] if suffix in ANNOTATION_SUFFIXES else IMAGE_SUFFIXES), ""
    if suffix in ANNOTATION_SUFFIXES:
        hint = " (without objects in the image: a file without any)"
    if not any(stem + ending in masks for stem in images for ending in ("", *MASK_ENDINGS)):
        stems = {photos.wildcard_text(path): stem for stem, path in images.items()}
        masks = unique_names((stems.get(labels.wildcard_text(path), name), path) for name, path in masks.items())
        hint += ", or one where the stars of both globs stand for the same text, as in rgb_*.jpg and mask_*.png"
    hint += labels.unread() if suffix not in ANNOTATION_SUFFIXES else ""
    for stem in sorted(images.keys() - masks.keys()):
        extended = [stem + ending for ending in MASK_ENDINGS if stem + ending in masks and stem + ending not in images]
        if len(extended) > 1:
            names = " and ".join(masks[name].name for name in extended)
            raise UserError(f"{images[stem]}: has {len(extended)} masks, {names}; keep one.")
        if extended:
            masks[stem] = masks.pop(extended[0])
    files = {stem: MaskFile(path) for stem, path in masks.items()}
    return paired_samples(images, files, lambda stem: f"the name {stem} in {globs.masks}{hint}")


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


class Glob:
    """The files below a folder that a pattern matches; their endings may be of either case.

    Raises UserError, starting with `where`, for a pattern that leaves the folder.
    """

    def __init__(self, folder: Path, pattern: str, where: str) -> None:
        *folders, self.name = PurePosixPath(pattern).parts or ("",)
        inside = self.name and not PurePosixPath(pattern).is_absolute() and ".." not in folders
        if not inside or re.search(r"[^/]\*\*|\*\*[^/]", pattern):
            raise UserError(
                f"{where} is {pattern}; a glob is relative to the raw folder and stays in it, and ** is a whole "
                "folder, as in images/**/*.jpg."
            )
        self.folder, self.pattern = folder, PurePosixPath(pattern)
        self.home = folder.joinpath(*takewhile(lambda part: not _WILDCARD.search(part), folders))
        depth = 99 if "**" in pattern else 1 + len(folders)
        matches = _expression(str(self.pattern)).fullmatch
        found = _files_below(self.home, depth, frozenset()) if self.home.is_dir() else ()
        self.files = sorted(path for path in found if matches(path.relative_to(folder).as_posix()))

    def images(self, suffixes: Collection[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
        """The images, or files of other suffixes, by their path below the folders before the first wildcard, without
        the fixed ending or, if the pattern has none, without the suffix.
        """
        # *_rgb.png has an ending that its masks need not share; *.[jp]* has none.
        ending = re.split(r"[*?\]]", self.name)[-1].removeprefix(self.name)
        below = ((path.relative_to(self.home), path) for path in self.files if path.suffix.lower() in suffixes)
        return unique_names(
            (str(place)[: -len(ending)] if "." in ending else str(place.with_suffix("")), path) for place, path in below
        )

    def wildcard_text(self, path: Path) -> str:
        """The text for which the wildcards but {class} stand in a path that matches, without the path's suffix."""
        wildcards = _WILDCARD.findall(str(self.pattern))
        texts = zip(wildcards, self._texts(path), strict=False)
        return "/".join(text for wildcard, text in texts if text and wildcard != CLASS)

    def class_name(self, path: Path) -> str:
        """The text for which {class} stands in a path that matches."""
        return str(self._texts(path)[_WILDCARD.findall(str(self.pattern)).index(CLASS)])

    def _texts(self, path: Path) -> tuple[str | None, ...]:
        found = path.relative_to(self.folder)
        match = _expression(str(self.pattern.with_suffix(""))).fullmatch(str(found.with_suffix("")))
        match = match or _expression(str(self.pattern)).fullmatch(str(found))
        assert match is not None
        return match.groups()

    def others(self) -> str:
        """Numbers and endings of the matching files that are not read as images."""
        endings = Counter(path.suffix.lower() for path in self.files)
        counts = ((ending, count) for ending, count in sorted(endings.items()) if ending not in IMAGE_SUFFIXES)
        return ", ".join(f"{count} {ending or 'without ending'}" for ending, count in counts)

    def unread(self) -> str:
        """The same, for the end of a message."""
        others = self.others()
        return f" ({others} match, but only {' '.join(sorted(IMAGE_SUFFIXES))} are read)" if others else ""


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


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression with a group for each wildcard. The ending may be of either case."""
    translated = {"**/": "(?:(.+)/)?", "**": "(.*)", "*": "([^/]*)", "?": "([^/])", CLASS: "([^/]+)"}
    parts = (
        translated.get(part) or (f"([{_set(part[1:-1])}])" if part[:1] == "[" else re.escape(part))
        for part in _WILDCARD.split(pattern)
    )
    stem, dot, suffix = "".join(parts).rpartition(r"\.")
    return re.compile(f"{stem}{dot}(?i:{suffix})" if "/" not in suffix else stem + dot + suffix, re.DOTALL)


def _set(letters: str) -> str:
    """The inside of a glob's [...] for a regular expression."""
    negated = "^" * letters.startswith("!")
    return negated + re.sub(r"[\[\\&~|^]", r"\\\g<0>", letters.removeprefix("!"))


def files_by_stem(folder: Path, pattern: str) -> dict[str, Path]:
    """The image files that a glob matches by their name without what follows its last star, or without the suffix."""
    ending = len(pattern.rpartition("*")[2])
    paths = [path for path in Glob(folder, pattern, str(folder)).files if path.suffix.lower() in IMAGE_SUFFIXES]
    return unique_names((path.name[:-ending] if ending else path.stem, path) for path in paths)


def images_in(folder: Path, pattern: str, domain: Domain, split: str) -> dict[str, Path]:
    """As `files_by_stem`, at least one."""
    images = files_by_stem(folder, pattern)
    if not images:
        state = "no image there matches that" if folder.is_dir() else "there is no such folder"
        raise MissingRawFiles(f"{folder}: split {split} of {domain.name} needs {pattern} in it, and {state}.")
    return images


def unique_names(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    by_name: dict[str, Path] = {}
    for name, path in named:
        if name in by_name:
            raise UserError(f"{path}: goes by the name {name}, as {by_name[name]} does. Keep one, or rename one.")
        by_name[name] = path
    return by_name


def listed_stems(path: Path) -> list[str]:
    """The stems in a list file: one sample a line, as a stem or as paths, of which the first counts."""
    return [PurePosixPath(line.split()[0]).stem for line in list_lines(path) if line.strip()]


def list_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise MissingRawFiles(f"{path}: there is no such file. It names the images of a split, one a line.")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: this is not text in UTF-8. It names the images of a split, one a line.") from None
