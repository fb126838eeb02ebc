"""Annotations of areas, in every form in which people have them, give the same train ids; mistakes are named."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.data.domain import IGNORE, Domain, LabelClass, Split
from multidomain_cct.data.packing.encode import LEFT_OUT, NO_SHAPES, TURNED_ALONE, Encoder
from multidomain_cct.data.packing.folders import folder_samples
from multidomain_cct.data.packing.pack import pack
from multidomain_cct.data.packing.raw_files import MissingRawFiles
from multidomain_cct.data.packing.shapes import Polygons
from multidomain_cct.errors import UserError

CLASSES = (
    LabelClass("floor", (9, 9, 9), ids=()),
    LabelClass("sofa", (1, 2, 3), ids=(0,), names=("sofa", "couch")),
    LabelClass("cat", (4, 5, 6), ids=(1,)),
)
SIZE = (8, 6)
"""Width and height of every image."""
SOFA = [1, 1, 7, 1, 7, 5, 1, 5]
CAT = [2, 2, 4, 2, 4, 4, 2, 4]
"""x y x y ... in pixels. The cat, which is smaller, lies on the sofa."""
EXPECTED = np.zeros((6, 8), dtype=np.uint8)
EXPECTED[1:5, 1:7] = 1
EXPECTED[2:4, 2:4] = 2


def domain(images: str = "images/*.jpg", masks: str = "", **changes: object) -> Domain:
    fields: dict[str, Any] = {
        "background": "floor",
        "ignore_names": ("blurred",),
        "splits": {"train": Split(images, masks)},
    }
    return Domain("room", "folder", **{"classes": CLASSES, **fields, **changes})


def draw_images(raw: Path, *names: str, size: tuple[int, int] = SIZE) -> None:
    for name in names or ("images/a.jpg",):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (90, 120, 60)).save(raw / name)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def packed(raw: Path, room: Domain) -> dict[str, np.ndarray]:
    """The masks of the split by key, as they are stored in a shard."""
    samples = Encoder(room, raw, "train")(folder_samples(room, raw, "train"))
    masks = {}
    for sample in samples:
        if isinstance(sample, str):
            raise UserError(sample)
        assert sample.mask is not None
        masks[sample.key] = np.asarray(Image.open(io.BytesIO(sample.mask)))
    return masks


def refused(raw: Path, room: Domain) -> str:
    """What is said about annotations that cannot be used."""
    with pytest.raises(UserError) as caught:
        packed(raw, room)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def coco(*annotations: dict[str, Any], names: tuple[str, ...] = ("a.jpg",)) -> dict[str, Any]:
    images = [{"id": n, "file_name": name, "width": 8, "height": 6} for n, name in enumerate(names)]
    rows = [{"id": 10 + n, "image_id": 0, **row} for n, row in enumerate(annotations)]
    categories = [{"id": 3, "name": "couch"}, {"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}]
    return {"images": images, "annotations": rows, "categories": categories}


BOTH = ({"category_id": 7, "segmentation": [CAT]}, {"category_id": 3, "segmentation": [SOFA]})


def cvat(*elements: str, name: str = "a.jpg") -> str:
    inside = "".join(elements)
    return f'<annotations><image id="0" name="{name}" width="8" height="6">{inside}</image></annotations>'


def cvat_polygon(label: str, numbers: list[int], order: int = 0) -> str:
    points = ";".join(f"{x},{y}" for x, y in zip(numbers[::2], numbers[1::2], strict=True))
    return f'<polygon label="{label}" points="{points}" z_order="{order}"/>'


def labelme(*shapes: dict[str, Any]) -> dict[str, Any]:
    return {"shapes": list(shapes), "imagePath": "a.jpg", "imageWidth": 8, "imageHeight": 6}


def labelme_polygon(label: str, numbers: list[int]) -> dict[str, Any]:
    return {"label": label, "points": list(zip(numbers[::2], numbers[1::2], strict=True)), "shape_type": "polygon"}


def yolo(number: int, numbers: list[int]) -> str:
    return " ".join([str(number), *(f"{value / (8, 6)[n % 2]:.6f}" for n, value in enumerate(numbers))]) + "\n"


def run_lengths(inside: np.ndarray, order: str) -> list[int]:
    """Runs that begin outside; COCO's go down the columns (F), CVAT's along the rows (C)."""
    flat = np.concatenate([[False], inside.ravel(order=order), [not inside.ravel(order=order)[-1]]])  # type: ignore[call-overload]
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(starts, prepend=0).tolist()


def png_of(inside: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(inside).save(buffer, "PNG")
    return buffer.getvalue()


def write_coco(raw: Path) -> Domain:
    write(raw / "train.json", coco(*BOTH))
    return domain(masks="train.json")


def write_coco_run_lengths(raw: Path) -> Domain:
    from pycocotools import mask as tools

    packed_runs = tools.encode(np.asfortranarray((EXPECTED == 2).astype(np.uint8)))
    runs = {"size": [6, 8], "counts": run_lengths(EXPECTED > 0, "F")}
    text = {"size": [6, 8], "counts": packed_runs["counts"].decode()}
    rows = ({"category_id": 7, "segmentation": text}, {"category_id": 3, "segmentation": runs, "iscrowd": 1})
    write(raw / "train.json", coco(*rows))
    return domain(masks="train.json")


def write_cvat(raw: Path) -> Domain:
    write(raw / "annotations.xml", cvat(cvat_polygon("cat", CAT), cvat_polygon("sofa", SOFA)))
    return domain(masks="annotations.xml")


def write_cvat_other_shapes(raw: Path) -> Domain:
    box = '<box label="sofa" xtl="1" ytl="1" xbr="7" ybr="5"/>'
    # The rows 1 to 3 and columns 2 to 4: the first row is empty.
    runs = ",".join(map(str, run_lengths(np.array([[False] * 3, [True, True, False], [True, True, False]]), "C")))
    write(raw / "job.xml", cvat(f'<mask label="cat" rle="{runs}" left="2" top="1" width="3" height="3"/>', box))
    return domain(masks="*.xml")


def write_labelme(raw: Path) -> Domain:
    write(raw / "images/a.json", labelme(labelme_polygon("cat", CAT), labelme_polygon("couch", SOFA)))
    return domain(masks="images/*.json")


def write_labelme_other_shapes(raw: Path) -> Domain:
    mask = base64.b64encode(png_of(np.ones((2, 2), dtype=bool))).decode()
    cat = {"label": "cat", "shape_type": "mask", "points": [[2, 2], [3, 3]], "mask": mask}
    write(raw / "labels/a.json", labelme(cat, {"label": "sofa", "shape_type": "rectangle", "points": [[7, 5], [1, 1]]}))
    return domain(masks="labels/*.json")


def write_yolo(raw: Path) -> Domain:
    write(raw / "labels/a.txt", yolo(1, CAT) + yolo(0, SOFA))
    return domain(masks="labels/*.txt")


def write_list(raw: Path) -> Domain:
    write(raw / "labels/a b.txt", yolo(0, SOFA) + yolo(1, CAT))
    write(raw / "train.txt", "/images/a.jpg\tlabels/a b.txt\n\n")
    return domain("train.txt")


def write_class_masks(raw: Path) -> Domain:
    for label, inside, scale in (("cat", EXPECTED == 2, 1), ("couch", EXPECTED > 0, 255)):
        (raw / "masks" / label).mkdir(parents=True)
        Image.fromarray((inside * scale).astype(np.uint8)).save(raw / "masks" / label / "a.png")
    return domain(masks="masks/{class}/*.png")


def write_class_masks_in_one_folder(raw: Path) -> Domain:
    (raw / "masks").mkdir()
    for label, inside in (("cat", EXPECTED == 2), ("sofa", EXPECTED > 0)):
        Image.fromarray(np.stack([inside * np.uint8(255)] * 3, axis=-1)).save(raw / f"masks/a_{label}.png")
    return domain(masks="masks/*_{class}.png")


FORMS = [
    write_coco,
    write_coco_run_lengths,
    write_cvat,
    write_cvat_other_shapes,
    write_labelme,
    write_labelme_other_shapes,
    write_yolo,
    write_list,
    write_class_masks,
    write_class_masks_in_one_folder,
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_mask_with_the_smaller_area_on_top(
    tmp_path: Path, form: Callable[[Path], Domain]
) -> None:
    draw_images(tmp_path)
    masks = packed(tmp_path, form(tmp_path))
    assert list(masks) == ["a"]
    assert masks["a"].tolist() == EXPECTED.tolist()


def test_an_order_in_the_file_comes_before_the_area(tmp_path: Path) -> None:
    draw_images(tmp_path)
    write(tmp_path / "a.xml", cvat(cvat_polygon("cat", CAT), cvat_polygon("sofa", SOFA, order=1)))
    assert packed(tmp_path, domain(masks="a.xml"))["a"].tolist() == np.where(EXPECTED > 0, 1, 0).tolist()


def test_pixels_belong_to_a_polygon_that_contains_their_centre() -> None:
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5)
    for _ in range(20):
        middle, angles = rng.uniform((5, 5), (35, 25)), np.sort(rng.uniform(0, 2 * np.pi, 9))
        points = middle + np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(3, 20, (9, 1))
        inside = np.zeros(x.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        left, top, patch = Polygons((points,)).patch((40, 30), "a")
        drawn = np.zeros_like(inside)
        drawn[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
        assert (drawn == inside).all()


def test_a_polygon_in_several_parts_is_one_area_and_one_outside_the_image_is_cut_off(tmp_path: Path) -> None:
    draw_images(tmp_path)
    parts = [[-2, -2, 2, -2, 2, 2, -2, 2], [6, 4, 9, 4, 9, 9, 6, 9]]
    write(tmp_path / "a.json", coco({"category_id": 7, "segmentation": parts}))
    expected = np.zeros((6, 8))
    expected[:2, :2] = expected[4:, 6:] = 2
    assert packed(tmp_path, domain(masks="a.json"))["a"].tolist() == expected.tolist()


@pytest.mark.parametrize("form", ["circle", "ellipse", "turned ellipse", "turned box"])
def test_round_and_turned_shapes_cover_the_pixels_whose_centres_they_contain(tmp_path: Path, form: str) -> None:
    draw_images(tmp_path)
    x, y = np.meshgrid(np.arange(8) + 0.5, np.arange(6) + 0.5)
    if form == "circle":
        shape = {"label": "cat", "shape_type": "circle", "points": [[4, 3], [4, 5]]}
        write(tmp_path / "images/a.json", labelme(shape))
        expected = (x - 4) ** 2 + (y - 3) ** 2 < 4
    elif form == "turned box":
        box = '<box label="cat" xtl="1" ytl="2" xbr="5" ybr="4" rotation="90"/>'
        write(tmp_path / "a.xml", cvat(box))
        expected = (x > 2) & (x < 4) & (y > 1) & (y < 5)
    else:
        # A quarter turn of the second gives the first.
        radii = 'rx="3.1" ry="1.2"' if form == "ellipse" else 'rx="1.2" ry="3.1" rotation="90"'
        write(tmp_path / "a.xml", cvat(f'<ellipse label="cat" cx="4" cy="3" {radii}/>'))
        expected = ((x - 4) / 3.1) ** 2 + ((y - 3) / 1.2) ** 2 < 1
    room = domain(masks="images/*.json" if form == "circle" else "a.xml")
    assert packed(tmp_path, room)["a"].tolist() == (2 * expected).tolist()


def test_ignored_names_and_an_ignored_background_are_ignored(tmp_path: Path) -> None:
    draw_images(tmp_path)
    write(tmp_path / "images/a.json", labelme(labelme_polygon("blurred", CAT), labelme_polygon("sofa", SOFA)))
    room = domain(masks="images/*.json", background="ignore")
    assert packed(tmp_path, room)["a"].tolist() == np.where(EXPECTED == 1, 1, IGNORE).tolist()


# Images without annotations


@pytest.mark.parametrize("form", ["coco", "yolo", "labelme", "cvat"])
def test_an_image_whose_annotation_is_empty_is_background_and_counted(tmp_path: Path, form: str) -> None:
    draw_images(tmp_path)
    masks = {"coco": "a.json", "yolo": "labels/*.txt", "labelme": "images/*.json", "cvat": "a.xml"}[form]
    write(tmp_path / masks.replace("*", "a"), {"coco": coco(), "yolo": "", "labelme": labelme(), "cvat": cvat()}[form])
    summary = pack(domain(masks=masks), tmp_path, "train", tmp_path / "out", workers=1)
    assert summary.remarks == {NO_SHAPES: 1}
    assert summary.pixels[0] == 48


@pytest.mark.parametrize("form", ["coco", "cvat"])
def test_images_that_the_annotations_do_not_list_are_named_and_counted(tmp_path: Path, form: str) -> None:
    draw_images(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg")
    name, content = {"coco": ("a.json", coco(*BOTH)), "cvat": ("a.xml", cvat())}[form]
    write(tmp_path / name, content)
    message = refused(tmp_path, domain(masks=name))
    assert f"{name}: does not list {tmp_path}/images/b.jpg (2 of 3 images of split train" in message
    assert "take them out of the split's `images`" in message


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_images_without_a_file_of_annotations_are_named_and_counted(tmp_path: Path, suffix: str) -> None:
    draw_images(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg")
    write(tmp_path / f"labels/a.{suffix}", yolo(0, SOFA) if suffix == "txt" else labelme())
    message = refused(tmp_path, domain(masks=f"labels/*.{suffix}"))
    assert message.startswith(f"{tmp_path}/images/b.jpg: has no mask; expected the name b in labels/*.{suffix}")
    assert "a file without any" in message
    assert "(2 of 3 have none)" in message


def test_an_image_without_a_mask_of_any_class_is_named(tmp_path: Path) -> None:
    draw_images(tmp_path, "images/a.jpg", "images/b.jpg")
    room = write_class_masks(tmp_path)
    assert "images/b.jpg: has no mask of any class; expected the name b in masks/{class}/*.png (1 of 2" in refused(
        tmp_path, room
    )


@pytest.mark.parametrize("form", ["coco", "cvat"])
def test_listed_images_that_are_not_on_disk_are_named_and_counted(tmp_path: Path, form: str) -> None:
    draw_images(tmp_path)
    name, content = {
        "coco": ("a.json", coco(*BOTH, names=("a.jpg", "b.jpg", "c.jpg"))),
        "cvat": ("a.xml", cvat().replace("</annotations>", cvat(name="b.jpg").partition("<annotations>")[2])),
    }[form]
    write(tmp_path / name, content)
    message = refused(tmp_path, domain(masks=name))
    assert f"{name}: lists b.jpg, and no image of split train has this name" in message
    assert {"coco": "(2 of 3 are absent)", "cvat": "(1 of 2 are absent)"}[form] in message


def test_a_class_mask_without_image_is_named(tmp_path: Path) -> None:
    draw_images(tmp_path)
    room = write_class_masks(tmp_path)
    (tmp_path / "masks/cat/z.png").write_bytes((tmp_path / "masks/cat/a.png").read_bytes())
    assert "masks/cat/z.png: has no image; expected the name z" in refused(tmp_path, room)


# Which annotations belong to an image


def test_splits_may_share_one_file_of_annotations_or_one_folder_of_images(tmp_path: Path) -> None:
    draw_images(tmp_path, "train/0.jpg", "val/0.jpg", "flat/a.jpg", "flat/b.jpg")
    write(tmp_path / "all.json", coco(*BOTH, names=("images\\train\\0.jpg", "images\\val\\0.jpg")))
    shared = domain(splits={name: Split(f"{name}/*.jpg", "all.json") for name in ("train", "val")})
    assert packed(tmp_path, shared)["0"].tolist() == EXPECTED.tolist()
    assert folder_samples(shared, tmp_path, "val")[0].mask.annotation.shapes == ()  # type: ignore[union-attr]
    write(tmp_path / "train.json", coco(*BOTH))
    write(tmp_path / "val.json", coco(names=("b.jpg",)))
    flat = domain(splits={name: Split("flat/*.jpg", f"{name}.json") for name in ("train", "val")})
    assert [sample.key for sample in folder_samples(flat, tmp_path, "train")] == ["a"]
    assert [sample.key for sample in folder_samples(flat, tmp_path, "val")] == ["b"]


def test_a_name_that_fits_two_images_equally_is_refused(tmp_path: Path) -> None:
    draw_images(tmp_path, "images/x/a.jpg", "images/y/a.jpg")
    write(tmp_path / "a.json", coco())
    assert "Give the files names that differ" in refused(tmp_path, domain("images/*/*.jpg", "a.json"))


def test_files_of_several_jobs_are_read_together_and_may_not_overlap(tmp_path: Path) -> None:
    draw_images(tmp_path, "images/a.jpg", "images/b.jpg")
    write(tmp_path / "xml/1.xml", cvat(cvat_polygon("cat", CAT)))
    write(tmp_path / "xml/2.xml", cvat(name="b.jpg"))
    assert sorted(packed(tmp_path, domain(masks="xml/*.xml"))) == ["a", "b"]
    write(tmp_path / "xml/3.xml", cvat())
    assert "xml/3.xml: lists a.jpg, as another file of the split does" in refused(tmp_path, domain(masks="xml/*.xml"))


# What is refused


def test_a_domain_that_does_not_say_its_background_is_refused(tmp_path: Path) -> None:
    draw_images(tmp_path)
    message = refused(tmp_path, domain(masks=write_coco(tmp_path).splits["train"].masks, background=""))
    assert "room: background is missing" in message
    assert "(floor, sofa, cat), or `background: ignore`" in message


@pytest.mark.parametrize("form", ["coco", "cvat", "labelme", "class masks"])
def test_a_class_that_the_table_lacks_is_named_with_the_nearest(tmp_path: Path, form: str) -> None:
    draw_images(tmp_path)
    if form == "coco":
        content = coco(*BOTH)
        content["categories"][0]["name"] = "sofas"
        write(tmp_path / "a.json", content)
        masks, where = "a.json", "a.json: annotation 11"
    elif form == "cvat":
        write(tmp_path / "a.xml", cvat(*2 * [cvat_polygon("sofas", SOFA)]))
        masks, where = "a.xml", "a.xml: polygon 1 of a.jpg (the first of 2)"
    elif form == "labelme":
        write(tmp_path / "images/a.json", labelme(labelme_polygon("sofas", SOFA)))
        masks, where = "images/*.json", "images/a.json: shape 1"
    else:
        masks = write_class_masks(tmp_path).splits["train"].masks
        (tmp_path / "masks/couch").rename(tmp_path / "masks/sofas")
        where = "masks/sofas/a.png"
    message = refused(tmp_path, domain(masks=masks))
    assert f'{where} has the class "sofas", which room does not have. Did you mean "sofa"? Add it to' in message
    assert "`ignore_names`" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "5 0 0 1 0 1 1",
            "line 1 has the class number 5, which no class of room has; known: 0, 1. Add it to the `ids`",
        ),
        ("0 0 0 1 0 1.5 1", "line 1 has the coordinate 1.5; YOLO's are from 0 to 1"),
        ("0 0 0 1 0 -1 1", "line 1 has the coordinate -1; YOLO's are from 0 to 1"),
        ("0 .5 .5 .2 .2", "line 1 has 4 numbers after the class, a box. Boxes are not masks"),
        ("0 .5 .5", "line 1 has 1 points; a polygon is at least 3 points"),
        ("0 .5 .5 .2 .2 .3 .3 .1", "line 1 has 7 coordinates; a polygon is at least 3 points, each x and y"),
        ("0 a b c d e f", "line 1 has coordinates that are not numbers"),
        ("0 nan 0 1 0 1 1", "line 1 has coordinates that are not numbers"),
        ("sofa 0 0 1 0 1 1", "line 1 begins with 'sofa'; a line is a class number"),
    ],
)
def test_a_line_of_yolo_that_is_no_polygon_is_named(tmp_path: Path, line: str, message: str) -> None:
    draw_images(tmp_path)
    write(tmp_path / "labels/a.txt", line)
    assert f"labels/a.txt: {message}" in refused(tmp_path, domain(masks="labels/*.txt"))


def test_yolo_coordinates_may_be_rounded_out_of_the_image(tmp_path: Path) -> None:
    draw_images(tmp_path)
    write(tmp_path / "labels/a.txt", "1 -0.0003 0 1.0003 0 1 1 0 1")
    assert packed(tmp_path, domain(masks="labels/*.txt"))["a"].tolist() == [[2] * 8] * 6


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "annotation 10 has no segmentation, only a box. Boxes are not masks"),
        ([[1, 1, 2, 2]], "annotation 10 has 2 points; a polygon is at least 3 points"),
        ([[1, 1, 2, 2, 90, 3]], "annotation 10 has a point far outside its image of 8x6 pixels"),
        ([["x"] * 6], "annotation 10 has coordinates that are not numbers"),
        ({"size": [3, 3], "counts": [0, 9]}, "annotation 10 has run lengths of 3x3 pixels, but its image is 8x6"),
        ({"size": [6, 8], "counts": [3, 4]}, "annotation 10 has run lengths that do not give its image"),
        ({"size": [6, 8], "counts": "zzzz"}, "annotation 10 has run lengths that do not give its image"),
        ({"size": [6, 8]}, "annotations[0] has no 'counts'"),
        (5, "annotations[0] cannot be read ("),
    ],
)
def test_a_segmentation_that_gives_no_area_is_named(tmp_path: Path, segmentation: object, message: str) -> None:
    draw_images(tmp_path)
    write(tmp_path / "a.json", coco({"category_id": 7, "segmentation": segmentation}))
    assert f"a.json: {message}" in refused(tmp_path, domain(masks="a.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": None}, "has no lists `images`, `annotations` and `categories`, so it is not COCO"),
        ({"categories": [{"id": 1}]}, "categories has no 'name'"),
        ({"images": [{"id": 1}]}, "images[0] has no 'file_name'"),
        ({"annotations": [{"id": 4, "image_id": 0, "category_id": 99}]}, "annotation 4 has the category_id 99, which"),
        ({"annotations": [{"id": 4, "image_id": 99, "category_id": 7}]}, "annotation 4 has the image_id 99, which"),
    ],
)
def test_a_file_of_coco_that_does_not_fit_together_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    draw_images(tmp_path)
    write(tmp_path / "a.json", coco() | change)
    assert f"a.json: {message}" in refused(tmp_path, domain(masks="a.json"))


def test_an_image_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    draw_images(tmp_path)
    write(tmp_path / "a.json", coco(names=("a.jpg", "a.jpg")))
    assert "a.json: lists the image a.jpg twice" in refused(tmp_path, domain(masks="a.json"))


def test_run_lengths_without_pycocotools_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_images(tmp_path)
    room = write_coco_run_lengths(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert "pip install 'multidomain-cct[coco]'" in refused(tmp_path, room)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json: cannot be read as JSON"),
        ("a.json", "[" * 100_000, "a.json: cannot be read as JSON"),
        ("images/*.json", "{}", "images/a.json: has no lists `images`"),
        ("a.xml", "<annotations><image>", "a.xml: cannot be read as XML"),
        ("a.xml", "<annotation/>", "a.xml: has the root <annotation>. Of XML, CVAT's is read"),
        ("a.xml", "<annotations><track/></annotations>", "a.xml: has tracks of a video"),
        ("a.xml", '<annotations><image name="a.jpg"/></annotations>', "a.xml: an <image> has no 'width'"),
        ("a.xml", cvat(cvat_polygon("cat", [1, 1, 2, 2])), "a.xml: polygon 1 of a.jpg has 2 points"),
        (
            "a.xml",
            cvat('<mask label="cat" rle="0,4" left="7" top="0" width="2" height="2"/>'),
            "a.xml: mask 1 of a.jpg covers columns 7 to 9",
        ),
        (
            "a.xml",
            cvat('<mask label="cat" rle="0,3" left="0" top="0" width="2" height="2"/>'),
            "a.xml: mask 1 of a.jpg cannot be read (",
        ),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    draw_images(tmp_path)
    write(tmp_path / name.replace("*", "a"), content)
    assert message in refused(tmp_path, domain(masks=name))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (labelme_polygon("cat", [1, 1, 2, 2]), "shape 1 has 2 points; a polygon is at least 3 points"),
        (
            {"label": "cat", "shape_type": "mask", "points": [[0, 0]], "mask": "?"},
            "shape 1 has a mask that is not base64",
        ),
        ({"label": "cat"}, "shape 1 has no 'points'"),
        ({"points": [[0, 0], [4, 0], [4, 4]]}, "shape 1 has no 'label'"),
        ({"label": "cat", "shape_type": "circle", "points": [[0, 0]]}, "shape 1 cannot be read ("),
    ],
)
def test_a_shape_of_labelme_that_gives_no_area_is_named(tmp_path: Path, shape: dict[str, Any], message: str) -> None:
    draw_images(tmp_path)
    write(tmp_path / "images/a.json", labelme(shape))
    assert f"images/a.json: {message}" in refused(tmp_path, domain(masks="images/*.json"))


@pytest.mark.parametrize("form", [write_coco, write_cvat, write_labelme, write_class_masks])
def test_annotations_of_another_size_than_the_image_are_refused(tmp_path: Path, form: Callable[[Path], Domain]) -> None:
    draw_images(tmp_path, size=(16, 12))
    message = refused(tmp_path, form(tmp_path))
    assert "8x6" in message
    assert "16x12" in message


def test_lines_and_points_are_left_out_and_counted(tmp_path: Path) -> None:
    draw_images(tmp_path)
    line = {"label": "cat", "points": [[0, 0], [5, 5]], "shape_type": "line"}
    write(tmp_path / "images/a.json", labelme(line, labelme_polygon("sofa", SOFA)))
    summary = pack(domain(masks="images/*.json"), tmp_path, "train", tmp_path / "out", workers=1)
    assert summary.remarks == {LEFT_OUT: 1}
    write(tmp_path / "a.xml", cvat('<points label="cat" points="1,1"/>', cvat_polygon("sofa", SOFA)))
    summary = pack(domain(masks="a.xml"), tmp_path, "train", tmp_path / "other", workers=1)
    assert summary.remarks == {LEFT_OUT: 1}


def test_annotations_of_a_turned_image_are_counted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "images").mkdir()
    Image.new("RGB", SIZE).save(tmp_path / "images/a.jpg", exif=exif)
    summary = pack(write_yolo(tmp_path), tmp_path, "train", tmp_path / "out", workers=1)
    assert summary.remarks[TURNED_ALONE] == 1


@pytest.mark.parametrize("values", [[0, 128, 255], [1, 2]])
def test_a_mask_of_one_class_with_more_than_two_values_is_refused(tmp_path: Path, values: list[int]) -> None:
    draw_images(tmp_path)
    room = write_class_masks(tmp_path)
    Image.fromarray(np.resize(values, (6, 8)).astype(np.uint8)).save(tmp_path / "masks/cat/a.png")
    assert "masks/cat/a.png: holds the values" in refused(tmp_path, room)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images/a.jpg labels/a.png more\n", "list.txt: line 1 has 3 columns; a line is the path of an image"),
        ("images/a.jpg\n", "list.txt: line 1 has 1 columns"),
        ("images/a.jpg,labels/a.png\n", "labels/a.png, and there is no such file (1 of 2 files are absent)"),
        ("\n", "list.txt: names no image"),
    ],
)
def test_a_list_that_does_not_give_pairs_is_refused(tmp_path: Path, text: str, message: str) -> None:
    draw_images(tmp_path)
    write(tmp_path / "list.txt", text)
    assert message in refused(tmp_path, domain("list.txt"))


@pytest.mark.parametrize("masks", ["absent.json", "absent/*.xml"])
def test_annotations_that_are_not_there_are_missing_files(tmp_path: Path, masks: str) -> None:
    draw_images(tmp_path)
    with pytest.raises(MissingRawFiles, match="split train of room needs absent"):
        folder_samples(domain(masks=masks), tmp_path, "train")


def test_other_annotations_of_the_same_size_are_another_packing(tmp_path: Path) -> None:
    draw_images(tmp_path)
    room = write_coco(tmp_path)
    pack(room, tmp_path, "train", tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="another class table or other settings"):
        pack(domain(masks="train.json", background="cat"), tmp_path, "train", tmp_path / "out", workers=1)
