"""What lies in a raw folder: which images and which labels, by the usual names.

Only names and the first lines are looked at here, to guess; `pack` reads everything and refuses what does not fit.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

from multidomain_cct.data.domain import Split
from multidomain_cct.data.packing.annotations import annotations_of_many, is_coco, is_labelme, read_json, read_xml
from multidomain_cct.data.packing.folders import list_pairs, matched_names
from multidomain_cct.data.packing.raw_files import CLASS, IMAGE_SUFFIXES, MASK_ENDINGS, Glob
from multidomain_cct.data.packing.shapes import Annotation
from multidomain_cct.errors import UserError

_SPLITS = {
    "train": r"train(ing)?([0-9_-].*)?",
    "val": r"val(id|idation)?([0-9_-].*)?|dev",
    "test": r"test(ing)?([0-9_-].*)?",
    "unlabelled": r"unlabell?ed.*|unsup.*|extra",
}
_LABELS = re.compile(r"mask|label(?!l?ed)|annot|^gt|_gt$|ground.?truth|segment|^seg$", re.IGNORECASE)
_LIST = re.compile(r"[^\s,]+(?:\s*,\s*|\s+)[^\s,]+|[^\t,]+[\t,]\s*[^\t,]+")


_MOST_PARTS = 8
"""Folders that may become splits of their own."""


@dataclass(frozen=True)
class Group:
    """Files of one kind and one split, below one folder."""

    home: Path
    suffix: str
    files: Mapping[str, Path]
    """By their path below `home`, without suffix."""

    def glob(self, raw: Path) -> str:
        below = self.home.relative_to(raw).as_posix()
        nested = any("/" in key for key in self.files)
        return ("" if below == "." else f"{below}/") + ("**/" if nested else "") + f"*{self.suffix}"


@dataclass(frozen=True)
class Finding:
    """One split that was found, and the files that hold its labels."""

    split: Split
    form: str
    """COCO, CVAT, Labelme, YOLO, class masks, masks, or nothing for an unlabelled split."""
    labels: tuple[Path, ...]
    num_images: int
    num_labelled: int


@dataclass(frozen=True)
class _Labels:
    """Labels of a group of photographs."""

    form: str
    glob: str
    files: tuple[Path, ...]
    count: int
    """Photographs that have labels in them."""
    split: str = ""
    """After which they are called."""
    images: str = ""
    """Glob of the photographs, where the group's own will not do."""


def survey(raw: Path) -> dict[str, Finding]:
    """The splits below a raw folder, by name. Raises UserError when there is no image."""
    files = Glob(raw, "**/*", "--raw").files
    lists = {path: pairs for path in files if path.suffix == ".txt" and (pairs := _pairs_of_list(raw, path))}
    if lists:
        return {_split_of(path.relative_to(raw)) or path.stem: _listed(raw, path, lists[path]) for path in lists}
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    masks = [
        path for path in images if _LABELS.search("/".join(path.relative_to(raw).parts[:-1])) or _ends_as_mask(path)
    ]
    photos = sorted(set(images) - set(masks))
    if not photos:
        held = f"{len(masks)} files that look like masks" if masks else "no image"
        raise UserError(
            f"{raw}: holds {held}, and no photographs. Name the folder above images and masks, such as one with "
            "images/train and masks/train."
        )
    found: list[tuple[str, Finding]] = []
    for (split, _), group in sorted(_groups(raw, photos).items()):
        found += _split(raw, split, group, masks, files)
    return _named(found)


def _split(
    raw: Path, split: str, group: Group, masks: Sequence[Path], files: Sequence[Path]
) -> list[tuple[str, Finding]]:
    """A group as one finding; by folder, if its glob matches other files too, or if whole folders have no labels."""
    exact = set(Glob(raw, group.glob(raw), "--raw").files) == set(group.files.values())
    whole = _labelled(raw, split, group, masks, files) if exact else []
    folders = _by_folder(group)
    partly = any(0 < finding.num_labelled < finding.num_images for _, finding in whole)
    if whole and not (partly and 1 < len(folders) < _MOST_PARTS):
        return whole
    parts = [finding for part in folders for finding in _labelled(raw, split, part, masks, files)]
    clean = all(part.num_labelled in (0, part.num_images) for _, part in parts)
    return parts if clean or not whole else whole


def _named(found: Sequence[tuple[str, Finding]]) -> dict[str, Finding]:
    """The findings by a name for each: that of its split if it has one, or else by whether it has labels."""
    findings: dict[str, Finding] = {}
    for name, finding in found:
        wanted = name or ("train" if finding.form else "unlabelled" if len(found) > 1 else "train")
        number = 2
        while wanted in findings:
            wanted = f"{wanted.rpartition('_')[0] or wanted}_{number}"
            number += 1
        findings[wanted] = finding
    return findings


def _pairs_of_list(raw: Path, path: Path) -> list[tuple[Path, Path]]:
    """The images and masks of a list; none when the file is something else."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline().strip()
        return list_pairs(raw, path) if _LIST.fullmatch(first) else []
    except (UnicodeDecodeError, UserError):
        return []


def _listed(raw: Path, path: Path, pairs: Sequence[tuple[Path, Path]]) -> Finding:
    masks = tuple(mask for _, mask in pairs)
    form = {".txt": "YOLO", ".json": "Labelme"}.get(masks[0].suffix.lower(), "masks")
    return Finding(Split(path.relative_to(raw).as_posix()), form, masks, len(pairs), len(pairs))


def _ends_as_mask(path: Path) -> bool:
    return path.stem.endswith(MASK_ENDINGS)


def _split_of(path: PurePosixPath | Path) -> str:
    """The split that a folder, or else the file's name, is called after."""
    names = [part.lower() for part in path.parts[-2::-1]] + re.split(r"[_.-]", path.stem.lower())
    return next((split for name in names for split, word in _SPLITS.items() if re.fullmatch(word, name)), "")


def _groups(raw: Path, paths: Iterable[Path]) -> dict[tuple[str, str], Group]:
    """The files by split and suffix."""
    members: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in paths:
        members[_split_of(path.relative_to(raw).parent / "_"), path.suffix.lower()].append(path)
    groups = {}
    for (split, suffix), found in members.items():
        home = Path(os.path.commonpath([path.parent for path in found]))
        keys = {path.relative_to(home).with_suffix("").as_posix(): path for path in found}
        groups[split, suffix] = Group(home, suffix, keys)
    return groups


def _labelled(
    raw: Path, split: str, photos: Group, masks: Sequence[Path], files: Sequence[Path]
) -> list[tuple[str, Finding]]:
    """A group of photographs with its labels, in the first form that is there; several splits if several files list
    its images.
    """
    listed = _of_many(raw, photos, files)
    if named := [labels for labels in listed if labels.split and labels.split == split]:
        listed = named
    elif split or not all(labels.split for labels in listed):
        listed = sorted(listed, key=lambda labels: -labels.count)[:1]
    others = () if listed else (*_of_one(raw, split, photos, files), *_of_masks(raw, split, photos, masks))
    images, total = photos.glob(raw), len(photos.files)
    return [
        (
            split or labels.split,
            Finding(Split(labels.images or images, labels.glob), labels.form, labels.files, total, labels.count),
        )
        for labels in (*listed, *others[:1])
    ] or [(split, Finding(Split(images), "", (), total, 0))]


def _of_many(raw: Path, photos: Group, files: Sequence[Path]) -> list[_Labels]:
    """The files of COCO or CVAT that list photographs of a group, each with the split after which it is called."""
    stems = {path.stem for path in photos.files.values()}
    found = []
    for path in files:
        if path.suffix.lower() not in (".json", ".xml") or path.stem in stems:
            continue
        if (annotations := _annotations(path)) and (count := len(matched_names(photos.files, annotations))):
            below, form = path.relative_to(raw), "CVAT" if path.suffix.lower() == ".xml" else "COCO"
            found.append(_Labels(form, below.as_posix(), (path,), count, _split_of(below)))
    return found


@cache
def _annotations(path: Path) -> Mapping[str, Annotation] | None:
    """What a file of COCO or CVAT lists; None for other JSON and XML. Every group of photographs asks for it."""
    if path.suffix.lower() == ".xml":
        return annotations_of_many(path) if read_xml(path).tag == "annotations" else None
    return annotations_of_many(path) if is_coco(read_json(path)) else None


def _of_one(raw: Path, split: str, photos: Group, files: Sequence[Path]) -> list[_Labels]:
    """Files of Labelme or YOLO that have the names of the photographs."""
    labels: list[_Labels] = []
    stems = {path.stem for path in photos.files.values()}
    for suffix, form in ((".json", "Labelme"), (".txt", "YOLO")):
        groups = _groups(raw, [path for path in files if path.suffix.lower() == suffix and path.stem in stems])
        group = groups.get((split, suffix)) or groups.get(("", suffix))
        if group and any(_is_form(path, form) for path in list(group.files.values())[:20]):
            labels.append(_Labels(form, group.glob(raw), tuple(group.files.values()), len(group.files)))
    return labels


def _is_form(path: Path, form: str) -> bool:
    try:
        return is_labelme(read_json(path)) if form == "Labelme" else path.read_text().split(" ")[0].isdecimal()
    except (UserError, UnicodeDecodeError):
        return False


def _of_masks(raw: Path, split: str, photos: Group, masks: Sequence[Path]) -> list[_Labels]:
    """Masks with the names of the photographs, the most complete first; or folders of masks, one for each class."""
    labels: list[_Labels] = []
    candidates = [group for (of, _), group in _groups(raw, masks).items() if of in (split, "")]
    for group in candidates:
        inside = _by_folder(group)
        labels += [label for one in (group, *inside) if (label := _masks_of(raw, photos, one)).count]
        named = {key.partition("/")[2] for key in group.files} & photos.files.keys()
        if len(inside) > 1 and named and all(_is_binary(next(iter(one.files.values()))) for one in inside):
            home = group.home.relative_to(raw).as_posix()
            paths = tuple(group.files.values())
            return [_Labels("class masks", f"{home}/{CLASS}/*{group.suffix}", paths, len(named))]
    # Of two folders, VOC's SegmentationClass and SegmentationObject, the one of classes.
    return sorted(labels, key=lambda label: (label.count, "class" in label.glob.lower()), reverse=True)


def _by_folder(group: Group) -> list[Group]:
    folders: dict[Path, dict[str, Path]] = defaultdict(dict)
    for path in group.files.values():
        folders[path.parent][path.stem] = path
    return [Group(folder, group.suffix, files) for folder, files in folders.items()]


def _masks_of(raw: Path, photos: Group, group: Group) -> _Labels:
    """A group of masks, with how many photographs have the same name or, where none has, the same text in it."""
    glob, paths = group.glob(raw), tuple(group.files.values())
    endings = ("", *MASK_ENDINGS)
    if same := sum(any(key + ending in group.files for ending in endings) for key in photos.files):
        return _Labels("masks", glob, paths, same)
    if "**" in glob + photos.glob(raw):
        return _Labels("masks", glob, paths, 0)
    (first, last), (before, after) = _affixes(group.files), _affixes(photos.files)
    texts = {key[len(first) : len(key) - len(last)] for key in group.files}
    shared = texts & {key[len(before) : len(key) - len(after)] for key in photos.files}
    images = photos.glob(raw).replace("*.", f"{before}*{after}.")
    return _Labels("masks", glob.replace("*.", f"{first}*{last}."), paths, len(shared), images=images)


def _is_binary(path: Path) -> bool:
    with Image.open(path) as image:
        return image.convert("RGB").getcolors(2) is not None


def _affixes(keys: Iterable[str]) -> tuple[str, str]:
    """What all names begin and end with, but for digits."""
    names = list(keys)
    prefix = re.sub(r"[0-9]+$", "", os.path.commonprefix(names))
    suffix = re.sub(r"[0-9]+$", "", os.path.commonprefix([name[len(prefix) :][::-1] for name in names]))
    return prefix, suffix[::-1]
