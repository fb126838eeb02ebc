"""A raw folder gives a first domain file that packs it, with its splits, classes and places to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.data.domain import Domain, Split
from multidomain_cct.data.packing.first_domain import LOOK, colours_apart, first_domain
from multidomain_cct.data.packing.pack import pack
from multidomain_cct.data.specification import read_domain
from multidomain_cct.errors import UserError

POLYGON = "0.1 0.1 0.9 0.1 0.5 0.9"


def photos(raw: Path, *names: str) -> None:
    for name in names:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (90, 120, 60)).save(raw / name)


def mask(path: Path, *values: int, palette: list[int] | None = None, color: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.resize(np.array(values, dtype=np.uint8), (6, 8))
    image = Image.fromarray(np.stack([ids, 0 * ids, ids // 2], axis=-1) if color else ids)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def coco(*names: str) -> dict[str, object]:
    return {
        "images": [{"id": n, "file_name": name, "width": 8, "height": 6} for n, name in enumerate(names)],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 5, "segmentation": [[1, 1, 7, 1, 4, 5]]}],
        "categories": [{"id": 9, "name": "road: wet"}, {"id": 5, "name": "cat"}],
    }


def labelme(label: str) -> dict[str, object]:
    return {"shapes": [{"label": label, "points": [[1, 1], [7, 1], [4, 5]], "shape_type": "polygon"}]}


def cvat(name: str) -> str:
    shape = '<polygon label="cat" points="1,1;7,1;4,5"/><box label="void" xtl="0" ytl="0" xbr="1" ybr="1"/>'
    return f'<annotations><image id="0" name="{name}" width="8" height="6">{shape}</image></annotations>'


def proposed(raw: Path, tmp_path: Path) -> tuple[Domain, str]:
    """The domain of the first file, and that file's text. Every labelled split can be packed."""
    text, findings = first_domain("mine", raw)
    write(tmp_path / "mine.yaml", text)
    domain = read_domain(tmp_path / "mine.yaml")
    assert list(domain.splits) == list(findings)
    for split, finding in findings.items():
        summary = pack(domain, raw, split, tmp_path / "out", workers=1)
        assert (summary.images, summary.labelled) == (finding.num_images, finding.num_labelled)
        assert not summary.unknown
    assert len({label.color for label in domain.classes}) == domain.num_classes
    return domain, text


def with_coco(raw: Path) -> dict[str, Split]:
    photos(raw, "images/train/a.jpg", "images/val/b.jpg", "images/unlabelled/c.jpg")
    write(raw / "annotations/instances_train.json", coco("a.jpg"))
    write(raw / "annotations/instances_val.json", coco("b.jpg"))
    write(raw / "annotations/captions.json", {"images": []})
    return {
        "train": Split("images/train/*.jpg", "annotations/instances_train.json"),
        "unlabelled": Split("images/unlabelled/*.jpg"),
        "val": Split("images/val/*.jpg", "annotations/instances_val.json"),
    }


def with_coco_and_one_folder(raw: Path) -> dict[str, Split]:
    photos(raw, "images/a.jpg", "images/b.jpg")
    write(raw / "train.json", coco("a.jpg"))
    write(raw / "valid.json", coco("b.jpg"))
    return {name: Split("images/*.jpg", f"{file}.json") for name, file in (("train", "train"), ("val", "valid"))}


def with_coco_beside_the_images(raw: Path) -> dict[str, Split]:
    photos(raw, "train/a.jpg", "valid/a.jpg")
    for name in ("train", "valid"):
        write(raw / name / "_annotations.coco.json", coco("a.jpg"))
    return {
        split: Split(f"{folder}/*.jpg", f"{folder}/_annotations.coco.json")
        for split, folder in (("train", "train"), ("val", "valid"))
    }


def with_cvat(raw: Path) -> dict[str, Split]:
    photos(raw, "images/a.jpg")
    write(raw / "annotations.xml", cvat("a.jpg"))
    write(raw / "other.xml", "<html/>")
    return {"train": Split("images/*.jpg", "annotations.xml")}


def with_labelme(raw: Path) -> dict[str, Split]:
    photos(raw, "photos/a.jpg", "photos/b.jpg", "more/c.jpg")
    write(raw / "photos/a.json", labelme("cat"))
    write(raw / "photos/b.json", labelme("_background_"))
    return {"unlabelled": Split("more/*.jpg"), "train": Split("photos/*.jpg", "photos/*.json")}


def with_yolo(raw: Path) -> dict[str, Split]:
    photos(raw, "images/train/a.jpg", "images/train/b.jpg", "images/val/c.jpg")
    for name, line in (("train/a", f"1 {POLYGON}"), ("train/b", ""), ("val/c", f"0 {POLYGON}")):
        write(raw / f"labels/{name}.txt", line)
    write(raw / "data.yaml", "names: {0: road, 1: cat}")
    return {name: Split(f"images/{name}/*.jpg", f"labels/{name}/*.txt") for name in ("train", "val")}


def with_class_masks(raw: Path) -> dict[str, Split]:
    photos(raw, "train/images/a.png", "train/images/b.png")
    for label, name in (("cat", "a"), ("road", "a"), ("cat", "b")):
        mask(raw / f"train/masks/{label}/{name}.png", 0, 255)
    return {"train": Split("train/images/*.png", "train/masks/{class}/*.png")}


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (with_coco, ["background", "road: wet", "cat"]),
        (with_coco_and_one_folder, ["background", "road: wet", "cat"]),
        (with_coco_beside_the_images, ["background", "road: wet", "cat"]),
        (with_cvat, ["background", "cat"]),
        (with_labelme, ["background", "cat"]),
        (with_yolo, ["background", "road", "cat"]),
        (with_class_masks, ["background", "cat", "road"]),
    ],
)
def test_annotations_give_splits_classes_and_a_background(
    tmp_path: Path, form: Callable[[Path], dict[str, Split]], names: list[str]
) -> None:
    raw = tmp_path / "raw"
    splits = form(raw)
    if form is with_coco_and_one_folder:
        # Each split's images are those in its own file.
        text, _ = first_domain("mine", raw)
        write(tmp_path / "mine.yaml", text)
        domain = read_domain(tmp_path / "mine.yaml")
        assert pack(domain, raw, "train", tmp_path / "out", workers=1).images == 1
    else:
        domain, text = proposed(raw, tmp_path)
    assert domain.splits == splits
    assert [label.name for label in domain.classes] == names
    assert domain.background == "background"
    assert f"background: background  {LOOK}" in text
    assert [label.thing for label in domain.classes] == [
        name not in ("background", "road", "road: wet") for name in names
    ]
    assert (f"{LOOK}there is no split `val`" in text) == ("val" not in splits)
    assert domain.ignore_names == (("void",) if form is with_cvat else ())


def test_masks_give_their_ids_and_the_colours_of_their_palette(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    palette = [0, 0, 0, 128, 0, 0, 0, 128, 0, *[9] * 3 * 253]
    for split, ids in (("train", (0, 1, 255)), ("val", (1, 2))):
        photos(raw, f"{split}/images/a_1.jpg")
        mask(raw / f"{split}/masks/a_1.png", *ids, palette=palette)
    domain, text = proposed(raw, tmp_path)
    assert domain.splits["val"] == Split("val/images/*.jpg", "val/masks/*.png")
    assert [(label.name, label.ids, label.color) for label in domain.classes] == [
        ("background", (0,), (0, 0, 0)),
        ("class_1", (1,), (128, 0, 0)),
        ("class_2", (2,), (0, 128, 0)),
    ]
    assert f"{LOOK}masks hold 255, which is taken to mean `no class`" in text
    assert domain.background == ""


def test_names_of_ids_come_from_a_list_of_classes(tmp_path: Path) -> None:
    photos(tmp_path / "raw", "images/a.jpg")
    mask(tmp_path / "raw/masks/a_mask.png", 0, 1)
    write(tmp_path / "raw/classes.txt", "sky\ncar\n")
    domain, _ = proposed(tmp_path / "raw", tmp_path)
    assert [(label.name, label.thing) for label in domain.classes] == [("sky", False), ("car", True)]


def test_masks_of_0_and_255_have_a_foreground(tmp_path: Path) -> None:
    photos(tmp_path / "raw", "images/a.jpg")
    mask(tmp_path / "raw/masks/a.png", 0, 255)
    domain, _ = proposed(tmp_path / "raw", tmp_path)
    assert [label.ids for label in domain.classes] == [(0,), (255,)]
    assert domain.ignore_ids == ()


def test_masks_of_colours_give_a_class_for_each(tmp_path: Path) -> None:
    photos(tmp_path / "raw", "rgb/rgb_01.jpg", "rgb/rgb_12.jpg")
    for number in ("01", "12"):
        mask(tmp_path / f"raw/gt/label_{number}.png", 0, 200, color=True)
    domain, _ = proposed(tmp_path / "raw", tmp_path)
    assert domain.splits == {"train": Split("rgb/rgb_*.jpg", "gt/label_*.png")}
    assert [(label.name, label.color) for label in domain.classes] == [
        ("background", (0, 0, 0)),
        ("color_c80064", (200, 0, 100)),
    ]


def test_of_two_folders_of_masks_the_one_of_classes_is_taken(tmp_path: Path) -> None:
    photos(tmp_path / "raw", "JPEGImages/a.jpg")
    mask(tmp_path / "raw/SegmentationObject/a.png", 0, 1, 2, 3)
    mask(tmp_path / "raw/SegmentationClass/a.png", 0, 15)
    domain, _ = proposed(tmp_path / "raw", tmp_path)
    assert domain.splits == {"train": Split("JPEGImages/*.jpg", "SegmentationClass/*.png")}


def test_a_list_of_pairs_is_a_split(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    photos(raw, "x/a.jpg", "x/b.jpg")
    for name in "ab":
        mask(raw / f"y/{name}.png", 0, 1)
        write(raw / f"lists/{'train' if name == 'a' else 'val'}.txt", f"x/{name}.jpg y/{name}.png\n")
    domain, _ = proposed(raw, tmp_path)
    assert domain.splits == {name: Split(f"lists/{name}.txt") for name in ("train", "val")}


def test_images_without_labels_in_a_labelled_split_are_counted(tmp_path: Path) -> None:
    photos(tmp_path / "raw", "images/a.jpg", "images/b.jpg", "images/c.jpg")
    mask(tmp_path / "raw/masks/a.png", 0, 1)
    text, _ = first_domain("mine", tmp_path / "raw")
    assert f"{LOOK}2 of 3 images have no labels; move them to a split without masks\n" in text
    with_yolo(tmp_path / "other")
    photos(tmp_path / "other", "images/val/d.jpg")
    text, _ = first_domain("mine", tmp_path / "other")
    assert f"{LOOK}1 of 2 images have no labels; move them to a split without masks, or give those without" in text


def test_many_masks_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multidomain_cct.data.packing.first_domain.MASKS_READ", 2)
    for name in "abcd":
        photos(tmp_path / "raw", f"images/{name}.jpg")
        mask(tmp_path / f"raw/masks/{name}.png", 0, 1)
    text, _ = first_domain("mine", tmp_path / "raw")
    assert f"{LOOK}the values are those of 2 of 4 masks" in text


# What is refused


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda raw: raw.mkdir(), "holds no image, and no photographs. Name the folder above"),
        (lambda raw: mask(raw / "masks/a.png", 0, 1), "holds 1 files that look like masks, and no photographs"),
        (lambda raw: photos(raw, "images/a.jpg"), "no labels that go by their names"),
        (
            lambda raw: (with_labelme(raw), photos(raw, "val/z.jpg"), mask(raw / "val_masks/z.png", 0)),
            "has labels of several kinds, Labelme and masks",
        ),
        (
            lambda raw: (photos(raw, "images/a.jpg"), write(raw / "coco.json", coco("a.jpg") | {"images": [{}]})),
            "coco.json: images[0] has no 'file_name'",
        ),
        (
            lambda raw: (photos(raw, "images/a.jpg"), write(raw / "images/a.json", {"shapes": []})),
            "the annotations have no shape, so nothing says which classes there are",
        ),
    ],
)
def test_a_folder_that_gives_no_domain_is_refused(tmp_path: Path, draw: Callable[[Path], object], message: str) -> None:
    draw(tmp_path / "raw")
    with pytest.raises(UserError) as caught:
        first_domain("mine", tmp_path / "raw")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_masks_that_hold_no_classes_are_refused(tmp_path: Path) -> None:
    photos(tmp_path, "images/a.jpg")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
        tmp_path / "masks/a.png"
    )
    with pytest.raises(
        UserError, match="masks/a.png: with it, masks hold more than 255 values, so they are not classes"
    ):
        first_domain("mine", tmp_path)
    mask(tmp_path / "masks/a.png", 0, 1)
    photos(tmp_path, "images/b.jpg")
    mask(tmp_path / "masks/b.png", 0, 200, color=True)
    with pytest.raises(UserError, match="some masks hold ids and others colours. Export all in one way"):
        first_domain("mine", tmp_path)


def test_chosen_colours_are_far_apart() -> None:
    for count, least in ((2, 200), (20, 80), (60, 50), (255, 25)):
        colours = colours_apart(count)
        assert len(set(colours)) == count
        assert (
            min(sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) ** 0.5 for pair in combinations(colours, 2))
            > least
        )
